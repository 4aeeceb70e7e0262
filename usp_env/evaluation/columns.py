"""What a metric found, before statistics: a value per dialogue (`Column`), one of the whole set (`Whole`), none (`Missing`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Column:
    """A metric with a value per dialogue, in natural units (shares and cosines in 0-1).

    Args:
        values: (m,); NaN: no judgement.
        scorer: What found them.
        of: What the card's number is: the mean of `values` over people; the mean over pairs of people, `values` being that over a
            row's pairs; the ratio of sums of `parts`; the harmonic mean of the means of `parts`, as in the paper's tables; or the
            Wasserstein-1 distance of the distributions of `parts`.
        parts: Of (m,): numerators and denominators, precisions and recalls, the jackknife's pseudo-values of pairs, or simulated
            and real numbers.
        among: `values` over some of the turns, given as (m, t); None where a row is not made of turns.
        twin: The same by the held-out scorer.
        note: See `usp_env.evaluation.card.Entry`.
        detail: See there.
    """

    values: FloatArray
    scorer: str
    of: Literal["mean", "pairs", "ratio", "harmonic", "distance"] = "mean"
    parts: tuple[FloatArray, ...] = ()
    among: Callable[[Mask], FloatArray] | None = None
    twin: Column | None = None
    note: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Whole:
    """A metric of a set of dialogues, in natural units.

    Args:
        value: NaN: no judgement.
        low: Of its 95 % interval; NaN, as `high`, where it has none.
        high: See `low`.
        n: People in the set.
        scorer: What found it.
        note: See `usp_env.evaluation.card.Entry`.
        detail: See there.
    """

    value: float
    low: float
    high: float
    n: int
    scorer: str
    note: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Missing:
    """A metric that was not measured, and why."""

    reason: str


Measured = Column | Whole | Missing


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one user gave at one level.

    Args:
        people: Whose dialogue each row is, (m,): people times seeds.
        metrics: Name to what was found.
        invalid: Outcome to how many generations or episodes gave nothing to measure.
        jobs: How many generations or episodes there were to make.
        rows: Also of each row, for `scores.jsonl`.
        compared: Which turns of each row a difference may rest on, (m, t), t the same for every user; None where users do not
            answer the same contexts.
        later: The same without each row's first turn, for differences to users that were given it; None without such users,
            and for those users themselves.
    """

    people: tuple[str, ...]
    metrics: Mapping[str, Measured]
    invalid: Mapping[str, int] = field(default_factory=dict)
    jobs: int = 0
    rows: Sequence[Mapping[str, Any]] = ()
    compared: Mask | None = None
    later: Measurement | None = None


def with_twin(columns: Sequence[Column]) -> Column:
    """The first column with the second, where there is one, as its twin."""
    return replace(columns[0], twin=columns[1]) if len(columns) > 1 else columns[0]
