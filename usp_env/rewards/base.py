"""Rewards: what they are, how expressions combine them, how they are named.

A reward looks at a profile and the dialogue so far and returns `RewardTerms` (or None: not scorable). Its *value* is
Σ dialogue terms + Σ mean of utterance vectors. A reward with `when="end"` is evaluated once and pays its value at the
end; one with `when="turn"` is evaluated after every agent step, its value is a potential Φ_t, and the step pays
Φ_t − Φ_{t−1} with Φ_0 = 0, so that the steps add up to the value at the end.

    usp_env.register_reward("politeness", politeness)
    gym.make("usp_env/Assistant-v0", reward="goal+0.1*politeness")
"""

from __future__ import annotations

import ast
import importlib
import inspect
import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from usp_env.backends import background
from usp_env.dialogue import Dialogue, Role
from usp_env.errors import BackendError, MissingAssetError, SpecError, UnknownNameError
from usp_env.profiles import Profile
from usp_env.records import RewardTerms as RewardTerms

When = Literal["turn", "end"]
PlainReward = Callable[[Profile, Dialogue], float | None]


@runtime_checkable
class RewardFunction(Protocol):
    """A reward over batches.

    Attributes:
        name: Of its term.
        when: `"end"`, or `"turn"` for a potential.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see Attributes

    @property
    def when(self) -> When: ...  # noqa: D102

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> Any:
        """One `RewardTerms` (or None: not scorable) per dialogue; may be a coroutine function.

        A `BackendError` in the place of a dialogue's terms says that a model failed on this dialogue alone.

        Raises:
            BackendError: A model failed after its retries; the episodes become `infra_failure`.
        """
        ...


def value(terms: RewardTerms) -> float:
    """A dialogue's scalar: Σ dialogue terms + Σ mean(utterance vectors).

    Example:
        >>> value(RewardTerms({"human": np.array([1.0, 0.0])}, {"cycle": 0.25}))
        0.75
    """
    return terms.value


def utterance_credit(terms: RewardTerms, k: int) -> list[float]:
    """Credit of each of the `k` agent utterances: Σ dialogue terms + Σ utterance vectors (paper Eq. 6).

    Example:
        >>> utterance_credit(RewardTerms({"human": np.array([1.0, 0.0])}, {"cycle": 0.25}), 2)
        [1.25, 0.25]

    Raises:
        SpecError: A vector does not have length `k`.
    """
    return terms.credit(k)


RewardLike = str | PlainReward | RewardFunction | None


@dataclass(frozen=True)
class PlainFunction:
    """A function `(profile, dialogue) -> float | None` as a reward at the end."""

    function: PlainReward
    name: str
    when: When = "end"

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | None]:
        """One call per dialogue."""
        return [self._terms(profile, dialogue) for profile, dialogue in zip(profiles, dialogues, strict=True)]

    def _terms(self, profile: Profile, dialogue: Dialogue) -> RewardTerms | None:
        value = self.function(profile, dialogue)
        if value is None:
            return None
        try:
            number = float("nan") if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not math.isfinite(number):
            raise SpecError(f"reward {self.name!r}: expected a finite number or None (not scorable), got {value!r:.80}")
        return RewardTerms(dialogue={self.name: number})


@dataclass(frozen=True)
class WeightedSum:
    """What an expression becomes.

    Args:
        parts: Weights and rewards.
        keep_failures: A dialogue on which a model failed has its `BackendError` in the place of its terms, as drivers want
            it; else the first such error is raised for the whole batch.

    Example:
        >>> length = PlainFunction(lambda profile, dialogue: float(len(dialogue)), "length")
        >>> (terms,) = WeightedSum(((0.5, length),))([Profile("a", "x", "y")], [Dialogue.of([{"role": "user", "content": "hi"}])])
        >>> terms.value
        0.5
    """

    parts: tuple[tuple[float, RewardFunction], ...]
    keep_failures: bool = False

    @property
    def when(self) -> When:
        """`"turn"` if any part is."""
        return "turn" if any(part.when == "turn" for _, part in self.parts) else "end"

    @property
    def name(self) -> str:
        """The expression."""
        return str(self)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the value besides profile and dialogue: of each part by name, empty where a part does not say."""
        return {part.name: getattr(part, "identity", {}) for _, part in self.parts}

    def at(self, final: bool, dense: bool = False) -> WeightedSum:
        """What a driver evaluates now: all parts at the end (or when dense), else the turn-wise ones; failures are kept."""
        due = self.parts if final or dense else tuple(p for p in self.parts if p[1].when == "turn")
        return replace(self, parts=due, keep_failures=True)

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[Any]:
        """Merged, weighted terms: `RewardTerms`, or None where any part is not scorable; see `keep_failures`.

        Raises:
            BackendError: A model failed on the batch; or, without `keep_failures`, on one dialogue.
        """
        if not self.parts:
            return [RewardTerms() for _ in dialogues]
        names = [part.name for _, part in self.parts]
        columns = [_evaluate(part, profiles, dialogues) for _, part in self.parts]
        merged = [
            _merge([(weight, name, terms) for (weight, _), name, terms in zip(self.parts, names, row, strict=True)])
            for row in zip(*columns, strict=True)
        ]
        for terms in merged if not self.keep_failures else ():
            if isinstance(terms, BackendError):
                raise terms
        return merged

    def __str__(self) -> str:
        return " + ".join(part.name if weight == 1 else f"{weight:g}*{part.name}" for weight, part in self.parts)


def register_reward(name: str, reward: PlainReward | RewardFunction) -> None:
    """Make a name usable in reward expressions everywhere in this process; naming it again replaces it.

    Raises:
        SpecError: The name is no identifier, is a built-in reward's, or the reward is not callable.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise SpecError(f"reward name: expected an identifier such as 'politeness', got {name!r}")
    if name in _BUILTIN:
        raise SpecError(f"reward name {name!r} is a built-in one; choose another")
    if not callable(reward):
        raise SpecError(f"reward {name!r}: expected a function or a RewardFunction, got {type(reward).__name__}")
    _registered[name] = reward


def make_reward(reward: RewardLike, agent_role: Role) -> WeightedSum | None:
    """A reward expression, function or `RewardFunction` as a `WeightedSum`; None stays None.

    Args:
        reward: E.g. `"goal"`, `"0.8*cycle+0.2*human"`, `"goal - 0.1*pkg.mod:fn"`.
        agent_role: The agent's seat.

    Raises:
        UnknownNameError: A name nobody registered.
        SpecError: The expression breaks the grammar (sums of `number*name`), or the seat does not fit.
        MissingAssetError: A scorer's weights are not there.
    """
    if reward is None or isinstance(reward, WeightedSum):
        return reward
    if isinstance(reward, str):
        return WeightedSum(tuple((weight, _named(name, agent_role)) for weight, name in parse_expression(reward)))
    if callable(reward):
        return WeightedSum(((1.0, _as_function(reward, getattr(reward, "__name__", "reward"))),))
    raise SpecError(f"reward: expected an expression, a function, a RewardFunction or None, got {reward!r:.80}")


def parse_expression(text: str) -> list[tuple[float, str]]:
    """Weights and names of a sum.

    Example:
        >>> parse_expression("goal - 0.5*pkg.mod:fn")
        [(1.0, 'goal'), (-0.5, 'pkg.mod:fn')]
    """
    text = " ".join(text.split())
    if not _encodable(text):
        raise SpecError(f"reward {text!r}: expected valid Unicode, got a lone surrogate")
    # `pkg.mod:fn` is no Python expression; an operator that nothing else uses stands for its colon.
    if (at := text.find("@")) >= 0:
        raise SpecError(f"reward {text!r}: '@' at character {at + 1} has no meaning here; expected a sum of NAME or NUMBER*NAME")
    weights: dict[str, float] = {}
    try:
        for weight, name in _terms_of(ast.parse(text.replace(":", "@"), mode="eval").body, 1.0, text):
            weights[name] = weights.get(name, 0.0) + weight
    except SyntaxError as error:
        at = error.offset or len(text) + 1
        raise SpecError(f"reward {text!r}: it breaks at character {at}; expected a sum such as 'goal+0.1*politeness'") from error
    except (RecursionError, MemoryError) as error:
        raise SpecError(
            f"reward {text!r:.80}…: too deep to read ({error}); expected a sum such as 'goal+0.1*politeness'"
        ) from error
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise SpecError(f"reward {text!r}: expected a finite weight of {name!r}, got {weight}")
    return [(weight, name) for name, weight in weights.items()]


def _encodable(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _terms_of(node: ast.expr, sign: float, text: str) -> list[tuple[float, str]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        right = -sign if isinstance(node.op, ast.Sub) else sign
        return _terms_of(node.left, sign, text) + _terms_of(node.right, right, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return _terms_of(node.operand, -sign if isinstance(node.op, ast.USub) else sign, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for number, name in ((node.left, node.right), (node.right, node.left)):
            if isinstance(number, ast.Constant) and isinstance(number.value, int | float) and not isinstance(number.value, bool):
                return [(sign * float(number.value) * weight, found) for weight, found in _terms_of(name, 1.0, text)]
    # 0.1*pkg.mod@fn parses as (0.1*pkg.mod)@fn: the two operators bind alike.
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and isinstance(node.right, ast.Name):
        modules = _terms_of(node.left, sign, text)
        if len(modules) == 1:
            return [(modules[0][0], f"{modules[0][1]}:{node.right.id}")]
    if isinstance(node, ast.Name | ast.Attribute) and all(part.isidentifier() for part in ast.unparse(node).split(".")):
        return [(sign, ast.unparse(node))]
    found, at = ast.get_source_segment(text, node), len(text.encode()[: node.col_offset].decode()) + 1
    raise SpecError(f"reward {text!r}: expected a sum of NAME or NUMBER*NAME, got {found!r} at character {at}")


def _named(name: str, agent_role: Role) -> RewardFunction:
    if ":" in name:
        return _as_function(_imported(name), name.partition(":")[2])
    if name in _registered:
        return _as_function(_registered[name], name)
    if name not in _BUILTIN:
        raise UnknownNameError("reward", name, [*_BUILTIN, *_registered, "<package.module>:<function>"])
    return _BUILTIN[name](agent_role)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"reward {name!r}: cannot import it ({error}); expected package.module:function") from error


def _as_function(reward: Any, name: str) -> RewardFunction:
    if isinstance(reward, RewardFunction):
        if reward.when not in ("turn", "end"):
            raise SpecError(f"reward {reward.name!r}: when must be 'turn' or 'end', got {reward.when!r}")
        return reward
    if not callable(reward):
        raise SpecError(f"reward {name!r}: expected a function or a RewardFunction, got {type(reward).__name__}")
    return PlainFunction(reward, name)


def _goal(agent_role: Role) -> RewardFunction:
    if agent_role != "assistant":
        raise SpecError("reward 'goal' scores the assistant's answers; the agent speaks as the user: use another, or reward=None")
    from usp_env.rewards.goal import GoalProgress

    return GoalProgress()


def _modelled(name: str, module: str, attribute: str) -> Callable[[Role], RewardFunction]:
    """A reward that needs models; opened when it is named, so that no other expression loads them."""

    def make(agent_role: Role) -> RewardFunction:
        try:
            reward: RewardFunction = getattr(importlib.import_module(module), attribute)()
        except MissingAssetError as error:
            raise MissingAssetError(f"reward {name!r}: {error}; or pass reward=None, or a reward of your own") from error
        return reward

    return make


_BUILTIN: dict[str, Callable[[Role], RewardFunction]] = {
    "goal": _goal,
    "cycle": _modelled("cycle", "usp_env.rewards.cycle", "CycleConsistency"),
    "human": _modelled("human", "usp_env.rewards.human_likeness", "HumanLikeness"),
    "consistency": _modelled("consistency", "usp_env.rewards.consistency", "PromptToLine"),
}
_registered: dict[str, PlainReward | RewardFunction] = {}


Outcome = RewardTerms | BackendError | None


def _evaluate(reward: RewardFunction, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[Outcome]:
    terms = reward(profiles, dialogues)
    if inspect.isawaitable(terms):
        terms = background.run(_result(terms))
    if not isinstance(terms, Sequence) or len(terms) != len(dialogues):
        came = f"{len(terms)} of them" if isinstance(terms, Sequence) else type(terms).__name__
        raise SpecError(
            f"reward {reward.name!r}: expected a list of one RewardTerms or None per dialogue ({len(dialogues)}), got {came}"
        )
    for item in terms:
        if item is not None and not isinstance(item, RewardTerms | BackendError):
            raise SpecError(f"reward {reward.name!r}: expected RewardTerms or None, got {item!r:.80}")
        for term, number in item.flat.items() if isinstance(item, RewardTerms) else ():
            if not math.isfinite(number):
                raise SpecError(f"reward {reward.name!r}: expected finite terms, or None (not scorable), got {term!r} = {number}")
    return list(terms)


async def _result(awaitable: Any) -> Any:
    # One loop for the life of the process: a client of the reward's own keeps its connections from call to call.
    return await awaitable


def _merge(row: Sequence[tuple[float, str, Outcome]]) -> Outcome:
    # A failure comes first: what another part makes of the dialogue would be worth asking again.
    if (failure := next((terms for _, _, terms in row if isinstance(terms, BackendError)), None)) is not None:
        return failure
    utterance: dict[str, Any] = {}
    dialogue: dict[str, float] = {}
    for weight, name, terms in row:
        if not isinstance(terms, RewardTerms):
            return None
        for term, vector in terms.utterance.items():
            utterance[_unique(term, name, utterance, dialogue)] = np.asarray(vector, dtype=float) * weight
        for term, number in terms.dialogue.items():
            dialogue[_unique(term, name, utterance, dialogue)] = float(number) * weight
    return RewardTerms(utterance, dialogue)


def _unique(term: str, reward: str, *taken: Mapping[str, Any]) -> str:
    for name in (term, f"{reward}.{term}"):
        if not any(name in terms for terms in taken):
            return name
    raise SpecError(f"two rewards of one expression both give the term {name!r}; rename one")
