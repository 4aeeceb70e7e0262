"""Whether two rankings, or several raters, agree, and how strong players are: Spearman, kappa, Elo."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError, require
from usp_env.metrics.statistics import REPLICATES, FloatArray, Interval, Values, percentile_interval

ELO_MEAN = 1000.0
"""The mean of all players' ratings."""
_ELO_SCALE = 400 / math.log(10)
_MAX_STEPS = 200


def ranks(values: Values) -> FloatArray:
    """Ranks from 1, smallest first; tied values share the mean of their ranks.

    Example:
        >>> ranks([0.3, 0.1, 0.3, 0.9])
        array([2.5, 1. , 2.5, 4. ])
    """
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], np.float64)


def spearman(x: Values, y: Values) -> float:
    """Spearman's rank correlation: Pearson's correlation of the ranks, ties at their mean rank (no shortcut that forbids them).

    Args:
        x: (n,); a pair with a NaN is left out.
        y: (n,).

    Returns:
        In [-1, 1]; NaN for fewer than 2 pairs, or where a side is constant.

    Raises:
        SpecError: Lengths that differ.

    Example:
        >>> spearman([1, 2, 3, 4], [10, 30, 20, 40])  # 1 - 6 (1 + 1) / (4 · 15)
        0.8
    """
    a, b = _paired(x, y)
    return _spearman(a, b)


def spearman_interval(x: Values, y: Values, *, replicates: int = REPLICATES, seed: int = 0) -> Interval:
    """Spearman's rank correlation with its bootstrap interval over pairs.

    With few pairs (five assistants) hardly an interval: prefer `ranking_interval`, over the people behind the scores.

    Args:
        x: (n,); a pair with a NaN is left out.
        y: (n,).
        replicates: Bootstrap replicates; one with a constant side is left out.
        seed: Of the resampling.

    Raises:
        SpecError: Lengths that differ.

    Example:
        >>> interval = spearman_interval(range(20), range(20))
        >>> round(interval.value, 9), round(interval.low, 9), interval.n
        (1.0, 1.0, 20)
    """
    a, b = _paired(x, y)
    rng = np.random.default_rng(seed)
    draws = [
        _spearman(a[rows], b[rows]) for rows in (rng.integers(len(a), size=len(a)) for _ in range(replicates if len(a) else 0))
    ]
    return percentile_interval(_spearman(a, b), [np.array(draws)], len(a))


def ranking_interval(scores: npt.NDArray[Any], reference: Values, *, replicates: int = REPLICATES, seed: int = 0) -> Interval:
    """Spearman between the mean scores of some players and a reference, with its bootstrap interval over the people who scored.

    Args:
        scores: (people, players).
        reference: What the players' means are ranked against, (players,); fixed.
        replicates: Bootstrap replicates.
        seed: Of the resampling.

    Returns:
        `n` is the number of people.

    Raises:
        SpecError: Other shapes, or a value that is not finite: every person must have scored every player.

    Example:
        >>> ranking_interval(np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]), [10, 20, 30])
        Interval(value=1.0, low=1.0, high=1.0, n=2)
    """
    table, fixed = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    if table.ndim != 2 or fixed.shape != table.shape[1:] or not np.isfinite(table).all() or not len(table):
        raise SpecError(
            f"expected finite scores (people, players) and a reference (players,), got {table.shape} and {fixed.shape}"
        )
    rng = np.random.default_rng(seed)
    drawn = (table[rng.integers(len(table), size=len(table))].mean(axis=0) for _ in range(replicates))
    return percentile_interval(
        _spearman(table.mean(axis=0), fixed), [np.array([_spearman(means, fixed) for means in drawn])], len(table)
    )


def _paired(x: Values, y: Values) -> tuple[FloatArray, FloatArray]:
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise SpecError(f"expected two vectors of one length, got {a.shape} and {b.shape}")
    defined = ~(np.isnan(a) | np.isnan(b))
    return a[defined], b[defined]


def _spearman(a: FloatArray, b: FloatArray) -> float:
    x, y = (ranks(values) - (len(a) + 1) / 2 for values in (a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return min(1.0, max(-1.0, float(x @ y) / scale)) if scale > 0 else math.nan


def cohen_kappa(
    a: Sequence[Hashable],
    b: Sequence[Hashable],
    weights: Literal["linear", "quadratic"] | None = None,
    labels: Sequence[Hashable] | None = None,
) -> float:
    """Cohen's kappa (1960) of two raters: (p_o - p_e) / (1 - p_e), by scikit-learn.

    Args:
        a: Labels of the first rater, (n,).
        b: Of the second, (n,).
        weights: For ordered labels, how disagreements weigh by their distance in `labels`.
        labels: All labels that there are, in order, where some may be unused; default: those used, sorted.

    Returns:
        At most 1, 0 by chance; NaN without items, or where both always give one and the same label.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        SpecError: Lengths that differ.

    Example:
        >>> round(cohen_kappa("yyynnyynnn", "yynnnyynyn"), 3)  # p_o = .8, p_e = .5
        0.6
    """
    if len(a) != len(b):
        raise SpecError(f"expected one label of each rater for every item, got {len(a)} and {len(b)}")
    if len(set(a) | set(b)) < 2:
        return math.nan
    return float(require("sklearn.metrics", "sampling").cohen_kappa_score(list(a), list(b), labels=labels, weights=weights))


def fleiss_kappa(ratings: Sequence[Sequence[Hashable]]) -> float:
    """Fleiss' kappa (1971): agreement of several raters, not necessarily the same ones on every item, against chance.

    kappa = (P - P_e) / (1 - P_e), with P the mean over items of the share of agreeing pairs of raters, and P_e the sum of the
    squared shares of the labels over all ratings.

    Args:
        ratings: Labels of each item, n lists of the same length r >= 2.

    Returns:
        At most 1, 0 by chance; NaN without items, or where only one label was ever given.

    Raises:
        SpecError: Items with fewer than 2 ratings, or with different numbers of them.

    Example:
        >>> fleiss_kappa(["aa", "bb", "ab", "aa"])  # P = 3/4; P_e = (5/8)^2 + (3/8)^2 = 34/64
        0.4666666666666667
    """
    raters = {len(item) for item in ratings}
    if not raters:
        return math.nan
    if len(raters) > 1 or min(raters) < 2:
        raise SpecError(f"expected the same number of ratings, at least 2, on every item, got {sorted(raters)}")
    r = raters.pop()
    tables = [Counter(item) for item in ratings]
    observed = float(np.mean([sum(n * (n - 1) for n in table.values()) / (r * (r - 1)) for table in tables]))
    shares = [n / (r * len(tables)) for n in sum(tables, Counter()).values()]
    chance = sum(share**2 for share in shares)
    return (observed - chance) / (1 - chance) if len(shares) > 1 else math.nan


def elo(results: Iterable[tuple[str, str, float]], *, prior: float = 0.5) -> dict[str, float]:
    """Elo ratings from pairwise results, as the maximum likelihood of the Bradley-Terry model: the order does not matter.

    P(a beats b) = 1 / (1 + 10^((R_b - R_a) / 400)), fitted by `elo_ratings`. Sequential Elo updates depend on
    which match comes first; these do not.

    Args:
        results: (a, b, score of a): 1 won, 0 lost, 0.5 drawn.
        prior: Wins, and as many losses, that each player is given against a player of fixed strength, so that one who never lost
            has a finite rating. It pulls ratings together, less the more matches there are; 0 is plain maximum likelihood.

    Returns:
        Player to rating, best first; their mean is 1,000.

    Raises:
        SpecError: A score outside of [0, 1], a player against itself, a prior below 0, with `prior=0` players whom no chain of
            wins leads to, or no convergence.

    Example:
        >>> matches = [("ann", "bob", 1.0)] * 3 + [("ann", "bob", 0.0)]  # odds 3: 400 log10(3) = 190.8 apart
        >>> {name: round(rating, 1) for name, rating in elo(matches, prior=0).items()}
        {'ann': 1095.4, 'bob': 904.6}
    """
    names, wins = _wins(results, prior)
    if not names:
        return {}
    ratings = elo_ratings(wins, prior)
    order = sorted(range(len(names)), key=lambda i: (-ratings[i], names[i]))
    return {names[i]: float(ratings[i]) for i in order}


def elo_ratings(wins: FloatArray, prior: float = 0.5) -> FloatArray:
    """The ratings of `elo`, from counted matches, by Newton's method.

    Where players win every match, the MM algorithm (Hunter 2004) takes 10^5 steps and more; this takes some ten.

    Args:
        wins: How often the row's player beat the column's, ties half each, (k, k).
        prior: As in `elo`.

    Returns:
        (k,), with mean 1,000.

    Example:
        >>> elo_ratings(np.array([[0.0, 3.0], [1.0, 0.0]]), prior=1e-9).round(1)  # odds 3: 400 log10(3) = 190.8 apart
        array([1095.4,  904.6])
    """
    games, points = wins + wins.T, wins.sum(axis=1)
    ratings = np.zeros(len(wins))
    for _ in range(_MAX_STEPS):
        p = 1 / (1 + np.exp(ratings[None] - ratings[:, None]))
        q = 1 / (1 + np.exp(-ratings))  # against the prior's player, of rating 0
        gradient = points + prior - (games * p).sum(axis=1) - 2 * prior * q
        curvature = games * p * (1 - p)
        hessian = np.diag(curvature.sum(axis=1) + 2 * prior * q * (1 - q)) - curvature
        if not prior:
            hessian += 1.0  # nothing fixes the ratings' mean: let it stay where it is
        step = np.linalg.solve(hessian, gradient)
        # Steps of at most 1 do not leave the region where the log-likelihood, which is concave, is near its parabola.
        ratings = ratings + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-9:
            return np.asarray(_ELO_SCALE * (ratings - ratings.mean()) + ELO_MEAN)
    raise SpecError(f"ratings still move by {np.abs(step).max():.1e} after {_MAX_STEPS} steps: raise the prior ({prior})")


def _wins(results: Iterable[tuple[str, str, float]], prior: float) -> tuple[list[str], FloatArray]:
    """Players by name, and how often the row's beat the column's."""
    scores: defaultdict[tuple[str, str], float] = defaultdict(float)
    for a, b, score in results:
        if a == b or not 0 <= score <= 1:
            raise SpecError(f"expected two players and a score in [0, 1], got {(a, b, score)!r}")
        scores[a, b] += score
        scores[b, a] += 1 - score
    names = sorted({name for pair in scores for name in pair})
    index = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for (a, b), score in scores.items():
        wins[index[a], index[b]] = score
    if prior < 0 or not (prior or _connected(wins > 0)):
        raise SpecError(
            f"expected a prior above 0 (got {prior}), or players who have all both won and lost, in chains that join them"
        )
    return names, wins


def _connected(beats: npt.NDArray[np.bool_]) -> bool:
    """Whether a chain of wins leads from every player to every other: else the likelihood has no maximum."""
    reach = beats | np.eye(len(beats), dtype=bool)
    for _ in range(len(beats).bit_length()):  # chains of 2, 4, 8, … wins
        reach = reach @ reach
    return bool(reach.all())
