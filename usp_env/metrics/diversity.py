"""How different simulated users are from one another, and whether they have collapsed into one.

LDL, uniformity and pairwise distances are facts about a set: a bootstrap that draws a person twice would put two points at
distance 0, so where they need an interval resample without replacement (subsets).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError
from usp_env.metrics.lexical import word_tokens
from usp_env.sampling.diagnostics import local_density_loss, uniformity_loss

FloatArray = npt.NDArray[np.float64]

_COLUMNS = 4096  # words of the vocabulary per block of the overlap matrix


class LDL(NamedTuple):
    """Local density loss of a set.

    Attributes:
        value: Mean distance to the nearest others, >= 0; NaN for fewer than 2 points. Lower is denser.
        k: Neighbours it was taken over: what was asked for, or n - 1 where the set is smaller.
    """

    value: float
    k: int


def ldl(embeddings: npt.NDArray[Any], k: int = 50) -> LDL:
    """LDL (paper, Figure 5): mean over points of the mean Euclidean distance to their k nearest neighbours within the set.

    The embeddings stay as they are. Sets of another size or another `k` do not compare: look at the `k` that comes back.

    Args:
        embeddings: (n, d).
        k: Neighbours, the point itself not counted; capped at n - 1.

    Example:
        >>> ldl(np.array([[0.0], [1.0], [3.0]]))  # each to both others: (2 + 1.5 + 2.5) / 3
        LDL(value=2.0, k=2)
    """
    capped = min(k, len(embeddings) - 1)
    return LDL(local_density_loss(embeddings, capped), capped) if len(embeddings) > 1 else LDL(math.nan, 0)


def uniformity(embeddings: npt.NDArray[Any], t: float = 2.0) -> float:
    """Uniformity (Wang & Isola 2020, eq. 2): log mean over pairs of exp(-t |x - y|^2); at most 0, lower is more spread out.

    Args:
        embeddings: (n, d), of norm 1.
        t: Scale; 2 in the paper.

    Returns:
        NaN for fewer than 2 embeddings.

    Example:
        >>> round(uniformity(np.array([[1.0, 0.0], [-1.0, 0.0]])), 6)  # one pair, squared distance 4
        -8.0
    """
    return uniformity_loss(embeddings, t) if len(embeddings) > 1 else math.nan


def first_turn_diversity(texts: Sequence[str]) -> FloatArray:
    """How little each first turn shares with the others: mean over the others of 1 - unigram overlap.

    After the pairwise unigram difference of "Flipping the Dialogue" (UserLM, 2025), whose exact formula is not public. Ours is
    the Jaccard distance of the sets of words, 1 - |A & B| / |A | B|: symmetric, and no text gains by being long.

    Args:
        texts: One first turn per dialogue, n.

    Returns:
        (n,), in [0, 1]; their mean is the mean over all pairs. NaN where a text has no words, or no other text has any.

    Example:
        >>> first_turn_diversity(["Fix my code!", "fix my bike", "hello"]).tolist()  # pairs: 1/2, 1, 1
        [0.75, 0.75, 1.0]
    """
    sets = [set(word_tokens([text])) for text in texts]
    sizes = np.array([len(words) for words in sets], np.float64)
    out = np.full(len(sets), np.nan)
    spoken = np.flatnonzero(sizes)
    if len(spoken) > 1:
        shared = _overlaps([sets[i] for i in spoken])
        distances = 1 - shared / (sizes[spoken, None] + sizes[None, spoken] - shared)
        out[spoken] = distances.sum(axis=1) / (len(spoken) - 1)
    return out


def _overlaps(sets: Sequence[set[str]]) -> FloatArray:
    """Sizes of all pairwise intersections, (n, n)."""
    index = {word: i for i, word in enumerate(dict.fromkeys(word for words in sets for word in sorted(words)))}
    rows = np.repeat(np.arange(len(sets)), [len(words) for words in sets])
    columns = np.array([index[word] for words in sets for word in words])
    shared = np.zeros((len(sets), len(sets)), np.float32)  # counts: exact below 2^24
    for start in range(0, len(index), _COLUMNS):
        block = np.zeros((len(sets), _COLUMNS), np.float32)
        here = (columns >= start) & (columns < start + _COLUMNS)
        block[rows[here], columns[here] - start] = 1
        shared += block @ block.T
    return shared.astype(np.float64)


def wasserstein(a: Sequence[float] | npt.NDArray[Any], b: Sequence[float] | npt.NDArray[Any]) -> float:
    """Wasserstein-1 distance of two empirical distributions on the line: the integral of |F_a - F_b|, exact.

    For numbers of turns it is in turns: how far, on average, conversations must be lengthened or cut to match.

    Args:
        a: Values, (n,).
        b: Values, (m,); m may differ from n.

    Returns:
        At least 0; NaN where a side is empty.

    Raises:
        SpecError: A value is not finite.

    Example:
        >>> wasserstein([1, 3], [3, 5]), wasserstein([0], [0, 1])
        (2.0, 0.5)
    """
    x, y = np.sort(np.asarray(a, np.float64).ravel()), np.sort(np.asarray(b, np.float64).ravel())
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise SpecError("expected finite values, got NaN or infinity: leave out what is not defined")
    if not len(x) or not len(y):
        return math.nan
    points = np.sort(np.concatenate([x, y]))
    gap = np.searchsorted(x, points[:-1], "right") / len(x) - np.searchsorted(y, points[:-1], "right") / len(y)
    return float(np.abs(gap) @ np.diff(points))


class Spread(NamedTuple):
    """Variance of dialogues between and within people.

    Attributes:
        between: Variance component between people, in squared units of the embeddings; 0 where it comes out negative.
        within: Mean square within people.
        ratio: between / within; infinite where people never vary, NaN where nothing varies.
        f: Pseudo-F, mean square between over mean square within: about 1 for people who do not differ.
        p_value: Share of permutations (the data itself counted) whose F is at least as high; NaN where nothing varies.
        alarm: Whether people cannot be told apart: `p_value` above `alpha`, or nothing varies.
    """

    between: float
    within: float
    ratio: float
    f: float
    p_value: float
    alarm: bool


def spread(
    embeddings: npt.NDArray[Any],
    profiles: Sequence[Hashable],
    *,
    permutations: int = 999,
    alpha: float = 0.05,
    seed: int = 0,
) -> Spread:
    """Collapse alarm: do dialogues of different people differ more than dialogues of one person?

    One-way analysis of variance in the space of the embeddings (PERMANOVA, Anderson 2001), tested by permuting the profiles over
    the dialogues. The component between people is (MS_between - MS_within) / n_0, with n_0 the effective number of
    dialogues a person.

    Args:
        embeddings: One vector per dialogue (of its user turns), (m, d).
        profiles: Whose dialogue it is, (m,).
        permutations: More give a finer `p_value`; the smallest possible is 1 / (permutations + 1).
        alpha: Where the alarm goes off. A collapsed user stays unnoticed with this probability.
        seed: Of the permutations.

    Raises:
        SpecError: Fewer than 2 people, nobody with 2 dialogues, so few that no result could silence the alarm, or bad shapes.

    Example:
        >>> x = np.array([[0.0], [0.1], [1.0], [1.1], [2.0], [2.1], [3.0], [3.1]])
        >>> people = spread(x, list("aabbccdd"))
        >>> round(people.f, 1), people.p_value < 0.05, people.alarm
        (666.7, True, False)
        >>> spread(np.ones((8, 2)), list("aabbccdd")).alarm
        True
    """
    x = np.asarray(embeddings, np.float64)
    _, labels, counts = np.unique(_codes(profiles), return_inverse=True, return_counts=True)
    _check_design(x, counts, permutations, alpha)
    m, people = len(x), len(counts)
    power = (x**2).sum()
    x = (x - x.mean(axis=0))[np.argsort(labels, kind="stable")]
    total = (x**2).sum()
    if total <= 1e-10 * power:  # a vector differs by 1e-7 with what shares its batch
        return Spread(0.0, 0.0, math.nan, math.nan, math.nan, True)
    sum_between = _between(x, counts)
    ms_between, ms_within = sum_between / (people - 1), max(total - sum_between, 0.0) / (m - people)
    ms_within = 0.0 if ms_within <= 1e-12 * total else ms_within
    component = max(ms_between - ms_within, 0.0) * (people - 1) / (m - (counts**2).sum() / m)
    rng = np.random.default_rng(seed)
    as_high = sum(_between(x[rng.permutation(m)], counts) >= sum_between * (1 - 1e-12) for _ in range(permutations))
    p_value = (1 + as_high) / (1 + permutations)
    f, ratio = (top / ms_within if ms_within else math.inf for top in (ms_between, component))
    return Spread(float(component), float(ms_within), float(ratio), float(f), float(p_value), bool(p_value > alpha))


def _codes(labels: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """A number for each label, by first appearance."""
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([index[label] for label in labels], np.int64)


def _between(x: FloatArray, counts: npt.NDArray[Any]) -> float:
    """Sum of squares between groups of centred rows that stand in the order of the groups."""
    sums = np.add.reduceat(x, np.cumsum(counts) - counts)
    return float(((sums**2).sum(axis=1) / counts).sum())


def _check_design(x: FloatArray, counts: npt.NDArray[Any], permutations: int, alpha: float) -> None:
    m, people = len(x), len(counts)
    if x.ndim != 2 or m != counts.sum():
        raise SpecError(
            f"expected one vector per dialogue, (m, d), and a profile for each, got {x.shape} and {counts.sum()} profiles"
        )
    if people < 2 or m == people:
        raise SpecError(
            f"expected at least 2 people, and 2 dialogues of at least one of them, got {m} dialogues of {people} people"
        )
    # Partitions into groups of these sizes, all equally likely where the profile does not matter.
    sizes = Counter(counts.tolist()).values()
    log_partitions = math.lgamma(m + 1) - sum(math.lgamma(n + 1) for n in (*counts.tolist(), *sizes))
    if min(math.exp(min(log_partitions, 50)), permutations + 1) < 1 / alpha:
        raise SpecError(
            f"{m} dialogues of {people} people, {permutations} permutations: too few for a p-value of {alpha}; "
            "add dialogues (4 people with 2 each will do) or permutations"
        )
