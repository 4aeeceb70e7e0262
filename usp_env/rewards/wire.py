"""The JSON of the reward service, read and written by `training.reward_service` and by its client `usp_env.rewards.remote`.

    POST /reward  {"profile": {"objective", "subjective"}, "messages": [{"role", "content"}, …]}
    200           {"valid": true, "reward": R, "utterance_rewards": [r_1 … r_K], "cc": cc, "human": [h_1 … h_K], "terms": {…}}
    200           {"valid": false, "reason": "…"}               cannot be scored: there is no number, not even 0
    otherwise     {"error": {"type": "…", "message": "…"}}      types and their statuses: `ERRORS`

    POST /reward  {"items": [ITEM, …]}     200 {"results": [one of the three above for each item, …]}

`terms` are the weighted terms that add up to `reward` (`RewardTerms`); `cc` and `human` are without weights, and null where the
service's expression has no such part. Keys that mean nothing here are passed over. No I/O.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError
from usp_env.profiles import Profile
from usp_env.records import RewardTerms

ERRORS = {
    "bad_request": 400,
    "not_found": 404,
    "method_not_allowed": 405,
    "too_large": 413,
    "reward_failed": 500,
    "backend_failed": 502,
    "queue_full": 503,
    "loading": 503,
    "stopping": 503,
}
"""Types of errors, and the status of each."""
PASSING = frozenset(name for name, status in ERRORS.items() if status in (502, 503))
"""Errors that another attempt may not meet."""


class Item(NamedTuple):
    """What is scored: a person and what was said."""

    profile: Profile
    dialogue: Dialogue


@dataclass(frozen=True)
class Failure:
    """An error in the place of a result.

    Args:
        type: One of `ERRORS`, or what another server calls it.
        message: What was expected, what came.
    """

    type: str
    message: str

    def to_json(self) -> dict[str, Any]:
        """As it goes over the wire.

        Example:
            >>> Failure("queue_full", "expected room").to_json()
            {'error': {'type': 'queue_full', 'message': 'expected room'}}
        """
        return {"error": {"type": self.type, "message": self.message}}


Result = RewardTerms | Failure | None
"""What came of an item; None: it cannot be scored."""


def item_json(profile: Profile, dialogue: Dialogue) -> dict[str, Any]:
    """One item, as a client sends it."""
    return {
        "profile": {"objective": profile.objective, "subjective": profile.subjective},
        "messages": [{"role": message.role, "content": message.content} for message in dialogue],
    }


def read_body(raw: bytes) -> dict[str, Any]:
    """A request's body.

    Raises:
        SpecError: It is no JSON object.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        # Not the decoder's own words on bytes that are no Unicode: they quote all of them.
        what = "bytes that are no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise SpecError(f"the body: expected one JSON object, got {len(raw)} bytes that are none ({what:.120})") from None
    if not isinstance(body, dict):
        raise SpecError(f"the body: expected a JSON object with 'profile' and 'messages', or 'items', got {_shown(body)}")
    return body


def read_item(value: Any) -> Item:
    """One item, as the service reads it.

    Example:
        >>> said = [{"role": "user", "content": "soup?"}]
        >>> item = read_item({"profile": {"objective": "You cook.", "subjective": "You are terse."}, "messages": said})
        >>> item.profile.objective, item.dialogue.turns
        ('You cook.', 1)

    Raises:
        SpecError: A field is missing or of another type; the message names it.
    """
    if not isinstance(value, dict):
        raise SpecError(f"an item: expected an object with 'profile' and 'messages', got {_shown(value)}")
    profile, messages = value.get("profile"), value.get("messages")
    if not isinstance(profile, dict):
        raise SpecError(f"profile: expected an object with 'objective' and 'subjective', got {_shown(profile)}")
    for key in ("objective", "subjective"):
        if not isinstance(profile.get(key), str):
            raise SpecError(f"profile.{key}: expected a string, got {_shown(profile.get(key))}")
        _check_text(profile[key], f"profile.{key}")
    if not isinstance(messages, list):
        raise SpecError(f"messages: expected a list of objects with 'role' and 'content', got {_shown(messages)}")
    dialogue = Dialogue.of(messages)
    for index, message in enumerate(dialogue):
        _check_text(message.content, f"message {index}")
    halves = profile["objective"], profile["subjective"]
    # A name that stands for the text: whoever keeps something by a profile's id must not mix two people up.
    name = hashlib.blake2b(json.dumps(halves).encode(), digest_size=16).hexdigest()
    return Item(Profile(name, *halves), dialogue)


def score_json(terms: RewardTerms, turns: int, cc: float | None, human: Sequence[float] | None) -> dict[str, Any]:
    """The result of a dialogue of `turns` user utterances.

    Args:
        terms: Weighted.
        turns: K.
        cc: Cycle consistency, in [−1, 1], without its weight.
        human: P(human) of each utterance, (K,), without its weight.

    Example:
        >>> score_json(RewardTerms({"human": np.array([0.2, 0.0])}, {"cycle": 0.4}), 2, 0.5, [1.0, 0.0])["utterance_rewards"]
        [0.6000000000000001, 0.4]

    Raises:
        SpecError: A vector does not have length `turns`.
    """
    return {
        "valid": True,
        "reward": terms.value,
        "utterance_rewards": terms.credit(turns),
        "cc": cc,
        "human": None if human is None else [float(p) for p in human],
        "terms": {
            "utterance": {name: [float(r) for r in vector] for name, vector in terms.utterance.items()},
            "dialogue": {name: float(r) for name, r in terms.dialogue.items()},
        },
    }


def read_results(body: Any, turns: Sequence[int]) -> list[Result]:
    """What a service answered to items of `turns` user utterances each.

    Raises:
        BackendError: It is no answer of a reward service to these items.
    """
    results = body.get("results") if isinstance(body, dict) else None
    if not isinstance(results, list) or len(results) != len(turns):
        came = f"{len(results)} results" if isinstance(results, list) else _shown(body)
        raise BackendError(f"expected an object with 'results', one for each of {len(turns)} items, got {came}")
    return [_read_result(result, k) for result, k in zip(results, turns, strict=True)]


def read_failure(body: Any) -> Failure | None:
    """The error in a body, if it is one."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("type"), str):
        return None
    return Failure(error["type"], str(error.get("message", "")))


def _read_result(result: Any, turns: int) -> Result:
    if (failure := read_failure(result)) is not None:
        return failure
    if isinstance(result, dict) and result.get("valid") is False:
        return None
    terms = result.get("terms") if isinstance(result, dict) and result.get("valid") is True else None
    utterance, dialogue = (terms.get(kind) if isinstance(terms, dict) else None for kind in ("utterance", "dialogue"))
    if not isinstance(utterance, dict) or not isinstance(dialogue, dict) or not (utterance or dialogue):
        raise BackendError(f"expected a result with 'terms', got {_shown(result)}")
    if not all(isinstance(v, list) and len(v) == turns and all(map(_finite, v)) for v in utterance.values()):
        raise BackendError(f"expected vectors of {turns} finite numbers, got {_shown(utterance)}")
    if not all(map(_finite, dialogue.values())):
        raise BackendError(f"expected finite terms, got {_shown(dialogue)}")
    return RewardTerms(
        {name: np.array(vector, dtype=float) for name, vector in utterance.items()},
        {name: float(number) for name, number in dialogue.items()},
    )


def _finite(value: Any) -> bool:
    # A whole number of 400 digits is JSON, too, and more than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpecError(f"{where}: expected valid Unicode, got a lone surrogate at character {error.start + 1}") from None


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.120}"
