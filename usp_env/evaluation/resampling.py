"""Intervals of what is no mean over people: bootstrap over people and, within them, dialogues; jackknife of sets of points."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt

from usp_env.metrics.statistics import Interval, percentile_interval

REPLICATES = 1000
GROUPS = 50  # of the jackknife

Rows = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def people_interval(
    people: Sequence[Hashable], statistic: Callable[[Rows], float], replicates: int | None = None, seed: int = 0
) -> Interval:
    """A statistic of rows with its two-level percentile bootstrap interval.

    Args:
        people: Whose row it is, (m,).
        statistic: Of rows, given by number; rows may come more than once.
        replicates: Of the bootstrap; None is `REPLICATES`.
        seed: Of the resampling.

    Example:
        >>> x = np.array([1.0, 3.0, 5.0])
        >>> people_interval(["ann", "bob", "cy"], lambda rows: float(np.median(x[rows]))).value
        3.0
    """
    if not len(people):
        return Interval(math.nan, math.nan, math.nan, 0)
    draws = resample(people, statistic, replicates, seed)
    return percentile_interval(statistic(np.arange(len(people))), [draws], len(set(people)))


def resample(
    people: Sequence[Hashable], statistic: Callable[[Rows], float], replicates: int | None = None, seed: int = 0
) -> FloatArray:
    """The replicates behind `people_interval`, of at least one person; their standard deviation is the standard error."""
    by_person: dict[Hashable, list[int]] = {}
    for row, who in enumerate(people):
        by_person.setdefault(who, []).append(row)
    counts = np.array([len(rows) for rows in by_person.values()], np.int64)
    table = np.zeros((len(counts), counts.max()), np.int64)
    for i, rows in enumerate(by_person.values()):
        table[i, : len(rows)] = rows
    rng = np.random.default_rng(seed)
    draws = np.empty(replicates or REPLICATES)
    for k in range(len(draws)):
        drawn = rng.integers(len(counts), size=len(counts))
        picks = (rng.random((len(drawn), table.shape[1])) * counts[drawn, None]).astype(np.int64)
        rows_drawn = table[drawn[:, None], picks][np.arange(table.shape[1]) < counts[drawn, None]]
        draws[k] = statistic(rows_drawn)
    return draws


def jackknife(points: FloatArray, statistic: Callable[[FloatArray], float], groups: int = GROUPS) -> Interval:
    """A statistic of a set of points, with value ± 1.96 standard errors of the delete-a-group jackknife.

    For facts about distances between points, where a bootstrap would put a point that it draws twice at distance 0 of itself.

    Args:
        points: (n, d), at least 2.
        statistic: Of some of the points.
        groups: Points are left out in so many groups, one by one where there are no more.

    Example:
        >>> interval = jackknife(np.array([[1.0], [2.0], [3.0]]), lambda x: float(x.mean()))  # s / sqrt(n) = 1 / sqrt(3)
        >>> interval.value, round((interval.high - interval.low) / 2 / 1.96, 3)
        (2.0, 0.577)
    """
    n = len(points)
    groups = min(groups, n)
    label = np.random.default_rng(0).permutation(n) % groups  # neighbours in order are not left out together
    left = np.array([statistic(points[label != g]) for g in range(groups)])
    value = statistic(points)
    error = math.sqrt((groups - 1) / groups * float(((left - left.mean()) ** 2).sum()))
    return Interval(value, value - 1.96 * error, value + 1.96 * error, n)
