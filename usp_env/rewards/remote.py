"""A reward that a service computes: `training.reward_service`, or whatever speaks its JSON (`usp_env.rewards.wire`).

    gym.make("usp_env/User-v0", assistant="smollm2-135m", reward=RemoteReward("http://gpu-box:5000"))
    usp_env.register_reward("remote", RemoteReward("http://gpu-box:5000"))       # then: reward="0.5*remote+0.1*politeness"

A dialogue that the service could not score is None, as in this process. A dialogue that it failed on has a `BackendError` in its
place, whatever went wrong: its episode becomes an `infra_failure`, and nothing is made up. Tried again are connection loss, 502
and 503 alone; all attempts and pauses of one call end with `timeout`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from usp_env.backends import background
from usp_env.backends.wire import retry_after
from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError, require
from usp_env.profiles import Profile
from usp_env.records import RewardTerms
from usp_env.rewards import wire
from usp_env.rewards.base import When

require("aiohttp", "service")
require("tenacity", "service")
import aiohttp  # noqa: E402
import tenacity  # noqa: E402

_CONNECT_TIMEOUT = 10.0
_LONGEST_PAUSE = 30.0
_RETRIED = (502, 503)
_jitter = random.Random()  # noqa: S311 - of its own: nobody's seeded state is touched


class _PassingError(Exception):
    """Another attempt may do better; `after` is the pause in seconds that the server asks for."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class RemoteReward:
    """The reward of a reward service.

    Args:
        url: Of the service, without `/reward`.
        timeout: Deadline of one call in seconds, retries included.
        name: In expressions; the terms keep the names that the service gives them.
        when: `"end"`, or `"turn"` for a potential.
        max_attempts: Most attempts of one call.
        max_items: Most dialogues of one request; more go in several at the same time.
        backoff: Longest first pause in seconds; it doubles from attempt to attempt.

    Raises:
        SpecError: The url is none of a server, holds a password, or a number is not above 0.

    Example:
        >>> RemoteReward("http://127.0.0.1:5000/").url
        'http://127.0.0.1:5000'
    """

    url: str
    timeout: float = 300.0
    name: str = "remote"
    when: When = "end"
    max_attempts: int = 8
    max_items: int = 64
    backoff: float = 0.5

    def __post_init__(self) -> None:
        if not _is_url(self.url):
            # Not shown: it may hold a password.
            raise SpecError(
                "reward service: expected a url such as 'http://127.0.0.1:5000', without password or query, got another"
            )
        for name in ("timeout", "max_attempts", "max_items", "backoff"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name}: expected more than 0, got {getattr(self, name)!r}")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the value besides profile and dialogue: the service's expression, its models and their digests.

        Raises:
            BackendError: The service does not answer, or is not ready.
        """
        health = background.run(self._identity())
        return {"reward": health.get("reward"), "models": health.get("models")}

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | BackendError | None]:
        """The service's terms of each dialogue; None where it cannot be scored; a `BackendError` where the service failed."""
        items = [wire.Item(*pair) for pair in zip(profiles, dialogues, strict=True)]
        return background.run(self._score(items))

    async def _score(self, items: Sequence[wire.Item]) -> list[RewardTerms | BackendError | None]:
        chunks = [items[start : start + self.max_items] for start in range(0, len(items), self.max_items)]
        async with self._session() as session:
            found = await asyncio.gather(*(_Call(self, session, chunk).run() for chunk in chunks))
        return [outcome for chunk in found for outcome in chunk]

    async def _identity(self) -> Mapping[str, Any]:
        async with self._session() as session:
            call = _Call(self, session, [])
            if await call.persist(call.look):
                return call.health
        raise BackendError(call.told())

    def _session(self) -> aiohttp.ClientSession:
        # One a call: a call is a whole batch, and what keeps no connections can be copied, pickled and forked.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=min(_CONNECT_TIMEOUT, self.timeout))
        return aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0))


class _Call:
    """One request with its retries: what is known of its items so far, and why the last attempt failed."""

    def __init__(self, reward: RemoteReward, session: aiohttp.ClientSession, items: Sequence[wire.Item]) -> None:
        self.reward, self.session, self.items = reward, session, items
        self.known: dict[int, wire.Result] = {}
        self.health: Mapping[str, Any] = {}
        self.attempts, self.last = 0, ""

    async def run(self) -> list[RewardTerms | BackendError | None]:
        await self.persist(self.ask)
        return [self._outcome(index) for index in range(len(self.items))]

    async def persist(self, attempt: Any) -> bool:
        """Whether an attempt succeeded before the deadline."""
        try:
            async with asyncio.timeout(self.reward.timeout):
                await self._policy()(attempt)
        except TimeoutError:
            self.last = f"no answer within {self.reward.timeout:g} s" + (f"; the last one was: {self.last}" if self.last else "")
        except (_PassingError, BackendError) as error:
            self.last = str(error)
        else:
            return True
        return False

    def told(self) -> str:
        return f"reward service {self.reward.url}: the call failed after {self.attempts} attempt(s): {self.last:.600}"

    async def ask(self) -> None:
        """One attempt for the items that no attempt has settled yet."""
        self.attempts += 1
        open_ = [index for index in range(len(self.items)) if index not in self.known]
        body = {"items": [wire.item_json(*self.items[index]) for index in open_]}
        answer = await self._json("POST", "/reward", json.dumps(body).encode())
        for index, result in zip(open_, wire.read_results(answer, [self.items[i].dialogue.turns for i in open_]), strict=True):
            if isinstance(result, wire.Failure) and result.type in wire.PASSING:
                self.last = f"{result.type}: {result.message}"
            else:
                self.known[index] = result
        if len(self.known) < len(self.items):
            raise _PassingError(self.last)

    async def look(self) -> None:
        """One attempt at the service's health."""
        self.attempts += 1
        answer = await self._json("GET", "/health", None)
        if not isinstance(answer, dict) or "reward" not in answer:
            raise BackendError(f"expected the health of a reward service, got {answer!r:.120}")
        self.health = answer

    async def _json(self, method: str, path: str, data: bytes | None) -> Any:
        headers = {"content-type": "application/json"} if data is not None else {}
        try:
            # A redirect would carry the dialogue to a server that nobody named.
            async with self.session.request(
                method, self.reward.url + path, data=data, headers=headers, allow_redirects=False
            ) as response:
                raw, status, after = await response.read(), response.status, retry_after(response.headers)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            self.last = f"connection lost, is the service running? ({type(error).__name__}: {error})"
            raise _PassingError(self.last) from None
        except aiohttp.ClientError as error:
            raise BackendError(f"an answer that is no HTTP ({type(error).__name__})") from None
        if status != 200:
            self.last = f"HTTP {status}: {_message(raw)}"
            raise _PassingError(self.last, after) if status in _RETRIED else BackendError(self.last)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise BackendError(f"expected JSON, got {raw[:120]!r}") from None

    def _policy(self) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            wait=self._pause,
            stop=tenacity.stop_after_attempt(self.reward.max_attempts) | tenacity.stop_before_delay(self.reward.timeout),
            reraise=True,
        )

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        longest = min(_LONGEST_PAUSE, self.reward.backoff * 2.0 ** (state.attempt_number - 1))
        return (error.after if isinstance(error, _PassingError) else 0.0) + longest * _jitter.uniform(0.5, 1.0)

    def _outcome(self, index: int) -> RewardTerms | BackendError | None:
        if index not in self.known:
            return BackendError(self.told())
        result = self.known[index]
        if isinstance(result, wire.Failure):
            return BackendError(f"reward service {self.reward.url}: {result.type}: {result.message:.600}")
        return result


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # no port, no address
        return False
    plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and plain


def _message(raw: bytes) -> str:
    try:
        failure = wire.read_failure(json.loads(raw))
    except (ValueError, RecursionError):
        failure = None
    return f"{failure.type}: {failure.message}" if failure else raw[:300].decode(errors="replace") or "(no body)"
