"""Any OpenAI-compatible server: OpenAI, vLLM, SGLang, llama.cpp and their like.

    OpenAIBackend("llama", ["http://localhost:8000/v1"]).generate([Request([{"role": "user", "content": "hi"}])])

A call that fails is a `Generation` with `error` set, in its own slot. Policy:

- at most `concurrency` calls are on their way; the others queue, and a call's deadline starts when it leaves the queue;
- the deadline holds for the whole call: all attempts, the pauses between them, a body that stalls;
- retried, with exponential backoff and jitter: 408, 409, 425, 429, 5xx, connection loss, and a 200 whose body is no
  answer (broken JSON, no choices), which a proxy in trouble sends; `Retry-After` is kept, and where it reaches beyond the
  deadline the call fails at once. Every other refusal is final;
- a conversation stays with one of several urls; on connection loss the call moves on to the next url at once.

How requests look on the wire, and what of it is lost, is written in `usp_env.backends.wire`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from usp_env.backends import background, wire
from usp_env.backends.base import Generation, Request, failed
from usp_env.backends.spec import ModelSpec
from usp_env.errors import BackendError, SpecError, require
from usp_env.models import assets
from usp_env.rendering import RENDERER_VERSION, Renderer

require("openai", "openai")
require("tenacity", "openai")
require("aiohttp", "openai")
import openai  # noqa: E402
import tenacity  # noqa: E402

_log = logging.getLogger(__name__)
_QUIET_SECONDS = 10.0  # between two warnings of one backend
NO_KEY = "EMPTY"  # what local servers expect where the client insists on a key
_RETRIED = (408, 409, 425, 429)
_OTHER_ENGINES = ("dtype", "device", "revision", "max_model_len", "gpu_memory_utilization", "prefix_gib")
_LONGEST_PAUSE = 30.0
# The HTTP library is the client's to choose: httpx, of late httpx2.
_RESPONSE: Any = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]).Response
_CONNECT_TIMEOUT = 10.0
# What the client takes from the environment for OpenAI is nobody else's business.
_NOT_SENT: Any = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}


class OpenAIBackend:
    """A model behind an OpenAI-compatible server.

    Args:
        model: Its name there.
        urls: Base urls (`…/v1`) of one or more servers of that model.
        key: Sent as the bearer token; never shown.
        timeout: Deadline of one call in seconds, retries included.
        concurrency: Most calls on their way at once.
        max_attempts: Most attempts of one call.
        backoff: Longest first pause in seconds; it doubles from attempt to attempt.
        renderer: Token ids for replies under a user header; None finds the model's tokenizer when one is needed.
        spec: Recorded in transcripts.

    Attributes:
        identity: Model, urls, and the versions of what is sent; a server does not tell its weights.
    """

    mutable = False

    def __init__(
        self,
        model: str,
        urls: Sequence[str],
        *,
        key: str = NO_KEY,
        timeout: float = 120.0,
        concurrency: int = 256,
        max_attempts: int = 6,
        backoff: float = 0.5,
        renderer: Renderer | None = None,
        spec: str = "",
    ) -> None:
        if not urls or isinstance(urls, str):
            raise SpecError(f"expected a list of base urls such as ['http://localhost:8000/v1'], got {urls!r}")
        for name, value in (("timeout", timeout), ("concurrency", concurrency), ("max_attempts", max_attempts)):
            if value <= 0:
                raise SpecError(f"{name}: expected more than 0, got {value!r}")
        self.model, self.urls, self.timeout, self.concurrency = model, tuple(urls), timeout, concurrency
        self.max_attempts, self.backoff = max_attempts, backoff
        self._told = -_QUIET_SECONDS
        self.spec = spec or str(ModelSpec("openai", model, self.urls))
        self._key = _checked_key(key, "the key")
        self._renderer = renderer
        self._renderer_lock = threading.Lock()
        self._jitter = random.Random()  # noqa: S311 - of its own: nobody's seeded state is touched
        self._session: _Session | None = None  # the background loop's alone

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> OpenAIBackend:
        """The backend of a parsed spec.

        `key_env` names the variable that holds the key. Without it no key is sent, but to OpenAI's own hosts, which get
        `OPENAI_API_KEY`: a key must not reach a server that nobody meant it for.

        Raises:
            SpecError: The variable that `key_env` names is not set, or an option of another engine.
        """
        if wrong := [name for name in _OTHER_ENGINES if name in spec.options]:
            raise SpecError(f"spec {str(spec)!r}: {', '.join(wrong)} means nothing to a server, which is set up on its own side")
        name = spec.options.get("key_env")
        if name is None and all(_is_openai(url) for url in spec.urls):
            name = "OPENAI_API_KEY"
        key = os.environ.get(name, "").strip() if name else ""
        if name and not key:
            raise SpecError(
                f"spec {str(spec)!r}: key_env names the environment variable {name}, which is not set; export {name}=…"
            )
        limits = {key: spec.options[key] for key in ("timeout", "concurrency") if key in spec.options}
        checked = _checked_key(key or NO_KEY, f"the environment variable {name}")
        return cls(spec.model, spec.urls, key=checked, spec=str(spec), **limits)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the output besides the request, as far as a client can tell."""
        versions = {"renderer": RENDERER_VERSION, "wire": wire.WIRE_VERSION}
        return {"engine": "openai", "model": self.model, "urls": sorted(self.urls), **versions}

    def __repr__(self) -> str:
        return f"OpenAIBackend({self.spec!r})"

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation per request, in order; safe from several threads and from inside a running loop.

        Raises:
            SpecError: A request without a prompt, or one that needs a tokenizer where there is none.
        """
        calls = [self._call(request) for request in requests]
        return background.run(self._serve(calls))

    async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` for event loops; cancelling it cancels the calls."""
        calls = await asyncio.to_thread(lambda: [self._call(request) for request in requests])
        return await background.arun(self._serve(calls))

    def close(self) -> None:
        """Close the connections; the next call opens new ones. Done at exit for whoever forgets."""
        if self._session is not None:
            background.run(self._close())

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.aclose()

    def _call(self, request: Request) -> wire.Call:
        if request.role == "assistant" and request.token_ids is None:
            return wire.chat_call(request, self.model)
        # Also for a user's ids that may not end: the end of the conversation can be banned only where its id is known.
        needed = request.role == "user" or request.can_end
        return wire.completion_call(request, self.model, self._find_renderer() if needed else self._renderer)

    def _find_renderer(self) -> Renderer:
        with self._renderer_lock:
            if self._renderer is None:
                self._renderer = _local_renderer(self.model, self.spec)
            return self._renderer

    async def _serve(self, calls: Sequence[wire.Call]) -> list[Generation]:
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:  # none yet, closed, or a forked parent's
            background.keep_inherited(self._session)
            self._session = _Session(loop, self.urls, self._key, self.timeout, self.concurrency)
            weakref.finalize(self, background.close_later, self._session.aclose).atexit = False
        session = self._session
        return await asyncio.gather(*(self._one(session, call) for call in calls))

    async def _one(self, session: _Session, call: wire.Call) -> Generation:
        losses, attempts, last = 0, 0, ""

        async def attempt() -> Generation:
            nonlocal losses, attempts, last
            attempts += 1
            url = (call.affinity + losses) % len(self.urls)
            try:
                return await session.send(url, call)
            except (openai.OpenAIError, wire.MalformedAnswerError) as error:
                losses += isinstance(error, openai.APIConnectionError)
                last = f" from {self.urls[url]}: {_describe(error)}"
                raise

        async with session.slots:
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._policy()(attempt)
            except TimeoutError:
                last = f": no answer within {self.timeout:g} s" + (f"; the last one was{last}" if last else "")
            except openai.APIStatusError as error:
                if wire.is_context_limit(error.status_code, error.code, error.message):
                    usage = {"prompt_tokens": 0, "completion_tokens": 0}
                    return Generation("", finish_reason="context_limit", usage=usage, notes=call.notes)
            except UnicodeEncodeError:
                last = ": the prompt holds a lone surrogate, which no request can carry"
            except (openai.OpenAIError, wire.MalformedAnswerError):
                pass  # `last` tells
        # Not chained: the client's errors hold the request, and with it the key.
        return failed(BackendError(self._hidden(f"{self.spec}: the call failed after {attempts} attempt(s){last}")))

    def _policy(self) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_is_passing),
            wait=self._pause,
            stop=tenacity.stop_after_attempt(self.max_attempts) | tenacity.stop_before_delay(self.timeout),
            before_sleep=self._tell,
            reraise=True,
        )

    def _tell(self, state: tenacity.RetryCallState) -> None:
        """Warn whoever waits for a server in trouble, though not of every call."""
        error, now = state.outcome.exception() if state.outcome else None, time.monotonic()
        if isinstance(error, Exception) and now - self._told >= _QUIET_SECONDS:
            self._told = now
            tries = f"attempt {state.attempt_number + 1} of {self.max_attempts}"
            _log.warning("%s: %s; trying again, %s", self.spec, self._hidden(_describe(error)), tries)

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, openai.APIConnectionError) and state.attempt_number < len(self.urls):
            return 0.0  # another url is untried
        longest = min(_LONGEST_PAUSE, self.backoff * 2.0 ** (state.attempt_number - 1))
        asked = wire.retry_after(error.response.headers) if isinstance(error, openai.APIStatusError) else 0.0
        return asked + longest * self._jitter.uniform(0.5, 1.0)

    def _hidden(self, text: str) -> str:
        """Without the key, which a server may echo; cut afterwards, so that no half of it is left."""
        text = text if self._key == NO_KEY else text.replace(self._key, "[key]")
        return text if len(text) <= 600 else text[:600] + "…"


class _Session:
    """The connections of one backend, on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, urls: Sequence[str], key: str, timeout: float, concurrency: int) -> None:
        limits = openai.Timeout(timeout, connect=min(_CONNECT_TIMEOUT, timeout))
        # httpx's pool looks at every connection for each request, which at 256 at a time costs more than the rest of a call.
        first = openai.AsyncOpenAI(
            api_key=key,
            base_url=urls[0],
            max_retries=0,
            timeout=limits,
            default_headers={} if all(map(_is_openai, urls)) else _NOT_SENT,
            # A redirect would carry the prompt to a server that nobody named.
            http_client=openai.DefaultAioHttpClient(timeout=limits, follow_redirects=False),
        )
        self.loop = loop
        self.clients = [first, *(first.copy(base_url=url) for url in urls[1:])]  # they share one pool of connections
        self.slots = asyncio.Semaphore(concurrency)
        background.add_closer(self.aclose)

    async def send(self, url: int, call: wire.Call) -> Generation:
        """One call to one server, as it answers."""
        # Not `completions.create`, which checks the body against its types: half of a call's time, and `wire` has typed it.
        path = "/chat/completions" if call.chat else "/completions"
        try:
            answer = await self.clients[url].post(path, cast_to=_RESPONSE, body={**call.body, **call.extra})
        except (openai.OpenAIError, UnicodeEncodeError):
            raise
        except Exception as error:  # what the HTTP library makes of an answer that is no HTTP
            raise wire.MalformedAnswerError(f"an answer that cannot be read ({type(error).__name__}: {error})") from None
        return wire.read(answer.content, call)

    async def aclose(self) -> None:
        background.discard_closer(self.aclose)
        if self.loop is asyncio.get_running_loop():
            await self.clients[0].close()


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may do better."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in _RETRIED or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | wire.MalformedAnswerError)


def _describe(error: Exception) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}: {error.response.text or '(no body)'}"
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        what = "no connection, is the server running?" if type(cause).__name__.startswith("Connect") else "connection lost"
        return f"{what} ({type(cause).__name__}: {cause})"
    return str(error)


def _checked_key(key: str, where: str) -> str:
    if not re.fullmatch(r"[!#-\[\]-~]+", key):
        raise SpecError(
            f"{where} holds something that cannot be sent as a key: expected printable ASCII without blanks or quotes"
        )
    return key


def _local_renderer(model: str, spec: str) -> Renderer:
    transformers = require("transformers", "hf")
    where = str(assets.path(model)) if model in assets.ASSETS else model
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=assets.offline())
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{spec}: a reply under a user header (or an end of conversation) goes through /v1/completions and needs the model's "
            f"tokenizer here, and {model!r} names none: serve the model under its packaged name, hub id or folder, or pass "
            f"OpenAIBackend(..., renderer=Renderer(tokenizer)). A chat model can play the user as 'roleplay:{spec}' ({error})"
        ) from error
    return Renderer(tokenizer)


def _is_openai(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "openai.com" or host.endswith(".openai.com")
