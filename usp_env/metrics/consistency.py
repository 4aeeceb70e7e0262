"""Factual consistency between a profile and what a user says (paper §4.1.3 and §5.3; NLI over atomic facts).

    Fact.Con(S, T) = 1/|T| Σ_{f in facts(T)} p(S supports f)          facts of a dialogue: its user turns

                 source S              target T
    DP.P         dialogue              profile                 is what the profile says borne out?
    DP.R         profile               dialogue                does the profile explain each turn?
    r-DP.P       given profile         simulated user turns    did the user stay with its profile?
    r-DP.R       simulated dialogue    given profile           did the user show all of its profile?

So r-DP.P of a pair is the DP.R of that pair: the names say which text was made from which. A profile is a `ProfileText` and a
dialogue is `DialogueTurns` here, and every function checks both, so that precision and recall cannot be taken for each other.

p comes from a verifier: `usp_env.models.scorers.FactVerifier`, an NLI model of the hub, or any object like them. The paper asks
GPT-4o, so that levels can be compared between users under one verifier, not with the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.models.facts import atomic_facts
from usp_env.profiles import Profile

FloatArray = npt.NDArray[np.float64]


class Verifier(Protocol):
    """Does a text support a claim? Both questions for `n` pairs at once: (n,), in [0, 1]."""

    def supported(self, turns: Sequence[Sequence[str]], facts: Sequence[str]) -> npt.NDArray[Any]:
        """p(a person's turns support the fact)."""
        ...

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> npt.NDArray[Any]:
        """p(the profile supports the turn)."""
        ...


@dataclass(frozen=True, slots=True)
class ProfileText:
    """A profile as a source of evidence or as a list of facts.

    Args:
        prose: Second-person prose, both paragraphs.

    Example:
        >>> ProfileText("You cook in Lyon, and you want a soup for 4.").facts()
        ['You cook in Lyon.', 'You want a soup for 4.']
    """

    prose: str

    @classmethod
    def of(cls, profile: Profile) -> ProfileText:
        """Of both paragraphs of a profile."""
        return cls(str(profile))

    def facts(self) -> list[str]:
        """Its atomic facts, in order (`usp_env.models.facts.atomic_facts`)."""
        return atomic_facts(self.prose)

    def blank(self) -> bool:
        """Whether it says nothing."""
        return not self.prose.strip()


@dataclass(frozen=True, slots=True)
class DialogueTurns:
    """The user's side of a dialogue; each turn is one fact.

    Args:
        turns: User utterances, in order.

    Example:
        >>> DialogueTurns.of(Dialogue.of([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]))
        DialogueTurns(turns=('hi',))
    """

    turns: tuple[str, ...]

    @classmethod
    def of(cls, dialogue: Dialogue) -> DialogueTurns:
        """Of the user turns of a dialogue."""
        return cls(tuple(dialogue.utterances("user")))

    def facts(self) -> list[str]:
        """The turns themselves; a blank turn stays, so that the k-th fact is the k-th turn."""
        return list(self.turns)

    def blank(self) -> bool:
        """Whether it says nothing."""
        return not any(turn.strip() for turn in self.turns)


@dataclass(frozen=True, slots=True)
class FactualConsistency:
    """Fact.Con(S, T) of `n` people, from one call of the verifier for them all.

    Args:
        source: What should support the facts, (n,): all `ProfileText` or all `DialogueTurns`.
        target: What is split into facts, (n,): all of the other type.

    Raises:
        SpecError: The two have different lengths, or are not one profile and one dialogue each.

    Example:
        >>> class SharesAWord:
        ...     def supported(self, turns, facts):
        ...         return np.array([float(bool(set(" ".join(t).split()) & set(f[:-1].split()))) for t, f in zip(turns, facts)])
        >>> profile, talk = ProfileText("You cook leeks. You sew."), DialogueTurns(("leeks pls", "thanks"))
        >>> FactualConsistency([talk], [profile])(SharesAWord())
        array([0.5])
    """

    source: Sequence[ProfileText] | Sequence[DialogueTurns]
    target: Sequence[ProfileText] | Sequence[DialogueTurns]

    def __post_init__(self) -> None:
        kinds = {(type(s), type(t)) for s, t in zip(self.source, self.target, strict=False)}
        if len(self.source) != len(self.target) or not kinds <= {(ProfileText, DialogueTurns)} | {(DialogueTurns, ProfileText)}:
            raise SpecError(
                f"expected a ProfileText and DialogueTurns for each person, got {len(self.source)} sources and "
                f"{len(self.target)} targets of {sorted((s.__name__, t.__name__) for s, t in kinds)}"
            )
        if len(kinds) > 1:
            raise SpecError("expected one direction for all people: sources all of one type, targets all of the other")

    def __call__(self, verifier: Verifier) -> FloatArray:
        """Mean over the facts of each target: (n,), in [0, 1]; NaN where source or target says nothing."""
        return np.array([mean_defined(values) for values in self.scores(verifier)], dtype=np.float64)

    def scores(self, verifier: Verifier) -> list[FloatArray]:
        """Scores of every target's facts, in order; NaN for a blank fact, and for all where the source is blank."""
        sources: list[ProfileText | DialogueTurns] = [*self.source]
        targets = [target.facts() for target in self.target]
        live = [
            (i, k)
            for i, (source, found) in enumerate(zip(sources, targets, strict=True))
            for k in range(len(found))
            if found[k].strip() and not source.blank()
        ]
        out = [np.full(len(found), np.nan) for found in targets]
        if not live:
            return out
        values = self._ask(verifier, [sources[i] for i, _ in live], [targets[i][k] for i, k in live])
        for (i, k), value in zip(live, values, strict=True):
            out[i][k] = value
        return out

    @staticmethod
    def _ask(verifier: Verifier, sources: Sequence[ProfileText | DialogueTurns], facts: list[str]) -> FloatArray:
        turns = [source.turns for source in sources if isinstance(source, DialogueTurns)]
        prose = [source.prose for source in sources if isinstance(source, ProfileText)]
        return shares(verifier.supported(turns, facts) if turns else verifier.explains(prose, facts), len(facts), "verifier")


def dp_p(source: Sequence[DialogueTurns], target: Sequence[ProfileText], verifier: Verifier) -> FloatArray:
    """DP.P: share of a profile's facts that the dialogue it was read from supports (paper Table 2).

    Args:
        source: The real dialogues, (n,).
        target: The profiles that were read from them, (n,).
        verifier: Asked once, by `supported`.

    Returns:
        (n,), in [0, 1]; NaN where a profile or a dialogue says nothing.

    Raises:
        SpecError: The arguments are swapped.

    Example:
        >>> class Half:
        ...     def supported(self, turns, facts):
        ...         return np.linspace(0, 1, len(facts))
        >>> dp_p([DialogueTurns(("hi",))], [ProfileText("You cook. You sew.")], Half())
        array([0.5])
    """
    return _directed(source, DialogueTurns, target, ProfileText)(verifier)


def dp_r(source: Sequence[ProfileText], target: Sequence[DialogueTurns], verifier: Verifier) -> FloatArray:
    """DP.R: mean over the user's turns of p(the profile explains the turn); see `dp_p`."""
    return _directed(source, ProfileText, target, DialogueTurns)(verifier)


def r_dp_p(source: Sequence[ProfileText], target: Sequence[DialogueTurns], verifier: Verifier) -> FloatArray:
    """r-DP.P: mean over a simulated user's turns of p(the given profile explains the turn) (paper Tables 3 and 4).

    A user that copies its profile scores high: read it beside r-DP.R and `usp_env.metrics.continuity.copied_from_profile`.

    Args:
        source: The profiles that the users were given, (n,).
        target: What they then said, (n,).
        verifier: Asked once, by `explains`.

    Returns:
        (n,), in [0, 1]; NaN where a profile or a dialogue says nothing.

    Raises:
        SpecError: The arguments are swapped.
    """
    return _directed(source, ProfileText, target, DialogueTurns)(verifier)


def r_dp_r(source: Sequence[DialogueTurns], target: Sequence[ProfileText], verifier: Verifier) -> FloatArray:
    """r-DP.R: share of the given profile's facts that the simulated dialogue shows (paper Table 4); see `r_dp_p`."""
    return _directed(source, DialogueTurns, target, ProfileText)(verifier)


def harmonic_mean(precision: npt.ArrayLike, recall: npt.ArrayLike) -> FloatArray:
    """2·P·R / (P + R), the paper's DPC and r-DPC; 0 where both are 0, NaN where either is NaN.

    The paper's tables hold the harmonic mean of the two columns' means: `harmonic_mean(np.nanmean(p), np.nanmean(r))`, not the
    mean of people's own harmonic means, which is never above it.

    Example:
        >>> harmonic_mean([86.89, 56.24, 0.0], [82.24, 74.38, 0.0]).round(2)
        array([84.5 , 64.05,  0.  ])
    """
    p, r = np.asarray(precision, dtype=np.float64), np.asarray(recall, dtype=np.float64)
    total = p + r
    return np.asarray(np.where(total == 0, 0.0, 2 * p * r / np.where(total == 0, 1.0, total)), dtype=np.float64)


def mean_defined(values: npt.ArrayLike) -> float:
    """Mean of the values that are not NaN; NaN where there is none (`np.nanmean` would warn)."""
    array = np.asarray(values, dtype=np.float64)
    kept = array[~np.isnan(array)]
    return float(kept.mean()) if kept.size else float("nan")


def shares(values: npt.ArrayLike, n: int, name: str) -> FloatArray:
    """What a model returned, as (n,) float64.

    Raises:
        SpecError: Another shape, or a value outside of [0, 1].
    """
    array: FloatArray = np.asarray(values, dtype=np.float64)
    if array.shape != (n,) or not np.all((array >= 0) & (array <= 1)):
        raise SpecError(f"{name}: expected {n} values in [0, 1], got {array!r:.120} of shape {array.shape}")
    return array


def _directed(source: Sequence[Any], source_kind: type, target: Sequence[Any], target_kind: type) -> FactualConsistency:
    for name, values, kind in (("source", source, source_kind), ("target", target, target_kind)):
        for value in values:
            if type(value) is not kind:
                raise SpecError(f"{name}: expected {kind.__name__}, got {value!r:.80}: are source and target swapped?")
    return FactualConsistency(source, target)
