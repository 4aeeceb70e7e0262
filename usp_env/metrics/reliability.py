"""Do a detector's probabilities come true? People's and assistants' texts of one length, bins of P(human), calibration error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue

BINS = 10
TOLERANCE = 0.2
"""|log of the ratio of lengths| within which two texts are a matched pair."""
_CUT = re.compile(r"(?<=[.!?:])\s+|\n+")
_Z = NormalDist().inv_cdf(0.975)

Array = npt.NDArray[Any]


class Text(NamedTuple):
    """A text, whose conversation it comes from, and whether a person wrote it."""

    cluster: str
    text: str
    human: bool


class Bin(NamedTuple):
    """Texts whose P(human) lies in [low, high), the last bin with 1.

    Attributes:
        low: Edge.
        high: Edge.
        n: Texts.
        predicted: Mean P(human).
        share: Of them that people wrote.
        ci95: Of the share, see `share_interval`.
    """

    low: float
    high: float
    n: int
    predicted: float
    share: float
    ci95: tuple[float, float]


def prefixes(reply: str) -> list[str]:
    """The first sentence of a reply, the first two, and so on.

    Example:
        >>> prefixes("Sure. Use a list: it is short")
        ['Sure.', 'Sure. Use a list:', 'Sure. Use a list: it is short']
    """
    ends = [*(match.start() for match in _CUT.finditer(reply)), len(reply)]
    return [part for part in dict.fromkeys(reply[:end].strip() for end in ends) if part]


def matched(rng: np.random.Generator, pool: Sequence[tuple[str, str]], text: str, own: str) -> tuple[str, str] | None:
    """The prefix of one of 8 replies that is nearest to a text in length, if any of another conversation is near enough.

    Args:
        rng: Draws the replies.
        pool: Conversation and reply, at least one.
        text: Not empty.
        own: Its conversation.

    Returns:
        Conversation and prefix.
    """
    options = []
    for k in rng.integers(len(pool), size=8):
        cluster, reply = pool[int(k)]
        if cluster == own:
            continue
        options += [(abs(np.log(len(part) / len(text))), cluster, part) for part in prefixes(reply[: 2 * len(text) + 200])]
    gap, cluster, part = min(options, key=lambda option: option[0], default=(np.inf, "", ""))
    return (cluster, part) if gap <= TOLERANCE else None


def length_matched(talks: Mapping[str, Dialogue], seed: int = 0) -> list[Text]:
    """Real user turns, each followed by the beginning of another conversation's reply of nearly its length.

    Assistants write more than people: a detector of length would look good. A turn that finds no partner is left out.

    Args:
        talks: Id to real conversation.
        seed: Of the draw of replies.

    Example:
        >>> a = Dialogue.of([{"role": "user", "content": "hi there!"}, {"role": "assistant", "content": "Sure."}])
        >>> b = Dialogue.of([{"role": "user", "content": "why is that"}, {"role": "assistant", "content": "Of course. Yes."}])
        >>> [tuple(text) for text in length_matched({"a": a, "b": b})]
        [('a', 'hi there!', True), ('b', 'Of course.', False)]
    """
    rng, found = np.random.default_rng(seed), []
    pool = [(id, reply) for id, talk in talks.items() for reply in talk.utterances("assistant") if reply.strip()]
    for id, talk in talks.items():
        for turn in talk.utterances("user"):
            if pool and turn.strip() and (match := matched(rng, pool, turn, id)):
                found += [Text(id, turn, True), Text(*match, False)]
    return found


def bins_of(probabilities: Array, labels: Array, clusters: Sequence[str], bins: int = BINS) -> list[Bin]:
    """The bins of a reliability diagram, equally wide; empty ones are left out.

    Args:
        probabilities: (n,), in [0, 1].
        labels: True where a person wrote it, (n,).
        clusters: Whose conversation it comes from, (n,).
        bins: How many.

    Example:
        >>> bins_of(np.array([0.1, 0.3]), np.array([False, True]), ["a", "b"], bins=2)[0][:5]
        (0.0, 0.5, 2, 0.2, 0.5)
    """
    p, y, places = np.asarray(probabilities, float), np.asarray(labels, float), _places(probabilities, bins)
    found = []
    for b in sorted(set(places.tolist())):
        rows = np.flatnonzero(places == b)
        ci = share_interval(y[rows], [clusters[i] for i in rows])
        found.append(Bin(b / bins, (b + 1) / bins, len(rows), float(p[rows].mean()), float(y[rows].mean()), ci))
    return found


def ece(probabilities: Array, labels: Array, bins: int = BINS) -> float:
    """Expected calibration error over equal-width bins: Σ n_b/n |mean p − share of positives| (Naeini et al., 2015).

    Few texts make it larger: a perfect detector's shares, too, differ from its probabilities by chance.

    Example:
        >>> round(ece(np.array([0.95, 0.95, 0.15]), np.array([1, 0, 0])), 4)  # 2/3 |.95 - .5| + 1/3 |.15 - 0|
        0.35
    """
    p, y, places = np.asarray(probabilities, float), np.asarray(labels, float), _places(probabilities, bins)
    return float(np.abs(np.bincount(places, p - y)).sum() / len(p))


def share_interval(labels: Array, clusters: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of a share: Wilson's, for as many independent texts as the spread of the conversations allows.

    With labels y of k conversations and share s, the variance of s is k/(k-1) Σ_c (Σ_c (y - s))² / n², and n' = s (1 - s) / it
    stands for n where it is less (Korn and Graubard, 1998). Where that says nothing (all labels the same, or one conversation)
    n' is the number of conversations. Unlike a bootstrap's it has a width there.

    Args:
        labels: (n,), n > 0.
        clusters: (n,).

    Example:
        >>> low, high = share_interval(np.ones(3), ["a", "a", "b"])  # n' = 2: 1 / (1 + 1.96² / 2)
        >>> round(low, 4), high
        (0.3424, 1.0)
    """
    y, share = np.asarray(labels, float), float(np.mean(labels))
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    k, n = len(names), len(y)
    spread = k / (k - 1) * float((np.bincount(place, y - share) ** 2).sum()) / n**2 if k > 1 else 0.0
    even = share * (1 - share)
    n_ = float(k) if k < 2 or not even else max(1.0, min(n, even / spread)) if spread > 0 else float(n)
    centre, half = share + _Z**2 / (2 * n_), _Z * math.sqrt(even / n_ + _Z**2 / (4 * n_**2))
    low, high = ((centre + side * half) / (1 + _Z**2 / n_) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def _places(probabilities: Array, bins: int) -> npt.NDArray[np.int64]:
    return np.minimum((np.asarray(probabilities, float) * bins).astype(np.int64), bins - 1)
