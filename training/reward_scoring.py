"""What the reward service computes: a reward over items, each with its result in JSON. No HTTP, no threads.

An item gets its own result whatever its batch holds: what fails on one item's account is told to that item alone.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError
from usp_env.profiles import Profile
from usp_env.records import RewardTerms
from usp_env.rewards.base import RewardFunction, WeightedSum, make_reward, parse_expression
from usp_env.rewards.cycle import CycleConsistency
from usp_env.rewards.wire import Failure, Item, score_json

Outcome = dict[str, Any] | Failure
"""What came of an item: its result in JSON (a score, or why there is none), or an error."""
WARM_UP = Item(
    Profile("warm-up", "You want to boil an egg.", "You write short turns."),
    Dialogue.of([{"role": "user", "content": "how long do i boil an egg"}]),
)
_log = logging.getLogger("usp_env.reward_service")


def expression(lam: float) -> str:
    """Eq. 6 as an expression.

    Args:
        lam: λ, the weight of cycle consistency, in [0, 1].

    Example:
        >>> expression(0.8)
        '0.8*cycle+0.2*human'

    Raises:
        SpecError: `lam` is outside of [0, 1].
    """
    if not 0 <= lam <= 1:
        raise SpecError(f"lambda: expected a number in [0, 1], got {lam!r}")
    return f"{lam:.12g}*cycle+{1 - lam:.12g}*human"


def open_reward(text: str, generator: str | None = None, embedder: str | None = None) -> WeightedSum:
    """The reward of an expression, for the user's seat, with its models loaded.

    Args:
        text: See `usp_env.rewards.base.make_reward`.
        generator: The profile generator of its part `cycle`; None is the packaged one.
        embedder: The embedder of that part; None is `"auto"`.

    Raises:
        SpecError: The expression breaks the grammar, or has no part `cycle` for the generator or embedder.
        UnknownNameError: A name that nobody registered.
        MissingAssetError: Weights that have to be fetched first.
    """
    terms = parse_expression(text)
    if (generator or embedder) and "cycle" not in dict((name, weight) for weight, name in terms):
        raise SpecError(f"reward {text!r}: --generator and --embedder belong to its part 'cycle', which it does not have")
    parts: list[tuple[float, RewardFunction]] = []
    for weight, name in terms:
        if name == "cycle":
            parts.append((weight, CycleConsistency(generator, embedder or "auto")))
        else:
            made = make_reward(name, "user")
            assert made is not None
            parts.append((weight, made.parts[0][1]))
    return WeightedSum(tuple(parts))


def models(reward: WeightedSum) -> dict[str, Any]:
    """Names and digests of what a reward asks, as JSON values."""
    found: dict[str, Any] = json.loads(json.dumps(reward.identity, default=str))
    return found


def score(reward: WeightedSum, items: Sequence[Item]) -> list[Outcome]:
    """The outcome of each item, from one call of each part of the reward; never raises.

    Where the reward raises, each item is scored again by itself, so that it harms no other.
    """
    try:
        return _score(reward, items)
    except BackendError as error:
        _log.warning("a model failed on a batch of %d: %s", len(items), type(error).__name__)
        return [Failure("backend_failed", str(error))] * len(items)
    except BaseException as error:  # in the worker's thread: nobody else would hear of it, and the service goes on
        if len(items) > 1:
            return [outcome for item in items for outcome in score(reward, [item])]
        # Where it was raised, not its words: they may quote the item.
        frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
        _log.error("the reward raised %s:\n%s", type(error).__name__, frames)
        return [Failure("reward_failed", f"the reward raised {type(error).__name__}: {str(error):.300}")]


def _score(reward: WeightedSum, items: Sequence[Item]) -> list[Outcome]:
    profiles, dialogues = [item.profile for item in items], [item.dialogue for item in items]
    # Each part by itself, without its weight: 0.8·cc / 0.8 is not always cc.
    columns = [WeightedSum(((1.0, part),), keep_failures=True)(profiles, dialogues) for _, part in reward.parts]
    known = [(w, _Known(part.name, column)) for (w, part), column in zip(reward.parts, columns, strict=True)]
    merged = WeightedSum(tuple(known), keep_failures=True)(profiles, dialogues)
    names = [part.name for _, part in reward.parts]
    rows = zip(items, merged, zip(*columns, strict=True), strict=True)
    return [_outcome(item, terms, dict(zip(names, row, strict=True))) for item, terms, row in rows]


@dataclass(frozen=True)
class _Known:
    """A part whose terms are there already."""

    name: str
    column: list[Any]
    when: Any = "end"

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[Any]:
        return self.column


def _outcome(item: Item, terms: Any, parts: dict[str, Any]) -> Outcome:
    if isinstance(terms, BackendError):
        return Failure("backend_failed", str(terms))
    if not isinstance(terms, RewardTerms):
        unread = [name for name, found in parts.items() if not isinstance(found, RewardTerms)]
        return {"valid": False, "reason": why_unscored(item, unread)}
    cycle, human = parts.get("cycle"), parts.get("human")
    cc = cycle.dialogue.get("cycle") if isinstance(cycle, RewardTerms) else None
    likeness = human.utterance.get("human") if isinstance(human, RewardTerms) else None
    return score_json(terms, item.dialogue.turns, cc, None if likeness is None else likeness.tolist())


def why_unscored(item: Item, unread: Sequence[str]) -> str:
    """Why an item has no score.

    Args:
        item: The item.
        unread: The parts of the reward that gave none.

    Example:
        >>> why_unscored(Item(WARM_UP.profile, Dialogue()), ["human"])
        'no user turn: the user said nothing'
    """
    if not any(text.strip() for text in item.dialogue.utterances("user")):
        return "no user turn: the user said nothing"
    if "cycle" in unread:
        blank = [half for half in ("objective", "subjective") if not getattr(item.profile, half).strip()]
        if blank:
            return f"the profile's {' and '.join(blank)} half is blank"
        return "the profile generator wrote no two paragraphs"
    return f"not scorable by {', '.join(unread)}"
