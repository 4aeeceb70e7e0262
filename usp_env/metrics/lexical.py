"""How rich a person's words are: MATTR, HD-D, Yule's K, distinct-n.

Words are `usp_env.models.features.words` without punctuation, in lower case. A dialogue's utterances come as a list, so that no
n-gram runs from one into the next; pass one list of everything to measure a corpus.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError
from usp_env.models import features

FloatArray = npt.NDArray[np.float64]
Turns = Sequence[Sequence[str]]

WINDOW = 50  # MATTR, in words
SAMPLE = 42  # HD-D, in words


def word_tokens(texts: Sequence[str]) -> list[str]:
    """Words of some texts in order, lower case, no punctuation.

    Example:
        >>> word_tokens(["Don't stop!", "Stop?"])
        ["don't", 'stop', 'stop']
    """
    return [word.casefold() for text in texts for word in features.words(text) if word[0].isalnum()]


def mattr(turns: Turns, window: int = WINDOW) -> FloatArray:
    """Moving-average type-token ratio (Covington & McFall 2010): mean share of distinct words over all windows of `window` words.

    Args:
        turns: A person's utterances per dialogue, n lists.
        window: Words.

    Returns:
        (n,), in (0, 1]; NaN for fewer than `window` words: a plain ratio of a shorter text would be higher for being short.

    Raises:
        SpecError: `window` < 1.

    Example:
        >>> mattr([["a b a", "c"]], window=2)  # ab, ba, ac
        array([1.])
        >>> mattr([["a a b b"]], window=3)  # aab, abb
        array([0.66666667])
    """
    if window < 1:
        raise SpecError(f"expected a window of at least 1 word, got {window}")
    return np.array([_mattr(word_tokens(own), window) for own in turns], np.float64)


def _mattr(words: list[str], window: int) -> float:
    if len(words) < window:
        return math.nan
    counts = Counter(words[:window])
    total = len(counts)
    for gone, new in zip(words, words[window:], strict=False):
        counts[new] += 1
        counts[gone] -= 1
        if not counts[gone]:
            del counts[gone]
        total += len(counts)
    return total / (window * (len(words) - window + 1))


def hdd(turns: Turns, sample: int = SAMPLE) -> FloatArray:
    """HD-D (McCarthy & Jarvis 2007): expected type-token ratio of `sample` words drawn without replacement.

    Sum over word types of the hypergeometric probability to be drawn at least once, 1 - C(N - f, s) / C(N, s), over s.

    Args:
        turns: A person's utterances per dialogue, n lists.
        sample: Words s; 42 in the literature.

    Returns:
        (n,), in (0, 1]; NaN for fewer than `sample` words.

    Raises:
        SpecError: `sample` < 1.

    Example:
        >>> hdd([["a a b"]], sample=2)  # a is always drawn, b in 2 of 3 pairs: (1 + 2/3) / 2
        array([0.83333333])
    """
    if sample < 1:
        raise SpecError(f"expected a sample of at least 1 word, got {sample}")
    return np.array([_hdd(Counter(word_tokens(own)), sample) for own in turns], np.float64)


def _hdd(counts: Counter[str], sample: int) -> float:
    n = counts.total()
    if n < sample:
        return math.nan
    drawn = 0.0
    for count, types in Counter(counts.values()).items():
        missed = math.exp(_log_choose(n - count, sample) - _log_choose(n, sample)) if n - count >= sample else 0.0
        drawn += types * (1 - missed)
    return drawn / sample


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def yules_k(turns: Turns) -> FloatArray:
    """Yule's K (1944): 10^4 (sum over word types of count^2 - N) / N^2. Lower is richer; nearly free of the text's length.

    Args:
        turns: A person's utterances per dialogue, n lists.

    Returns:
        (n,), in [0, 10^4): 0 where no word comes twice. NaN without words.

    Example:
        >>> yules_k([["a b a"], ["a b c"]])  # 10^4 (4 + 1 - 3) / 9
        array([2222.22222222,    0.        ])
    """
    out = np.full(len(turns), np.nan)
    for i, own in enumerate(turns):
        counts = np.array(list(Counter(word_tokens(own)).values()), np.float64)
        if len(counts):
            out[i] = 1e4 * ((counts**2).sum() - counts.sum()) / counts.sum() ** 2
    return out


def distinct_n(turns: Turns, n: int = 2) -> FloatArray:
    """Distinct-n (Li et al. 2016): distinct n-grams over all n-grams. Falls with length: compare texts of like length.

    Args:
        turns: A person's utterances per dialogue, n lists; n-grams stay within an utterance.
        n: Words of an n-gram.

    Returns:
        (n,), in (0, 1]; NaN where no utterance has n words.

    Raises:
        SpecError: n < 1.

    Example:
        >>> distinct_n([["a b", "a b", "c a"]])  # ab, ab, ca
        array([0.66666667])
    """
    if n < 1:
        raise SpecError(f"expected n-grams of at least 1 word, got {n}")
    return np.array([_distinct([word_tokens([text]) for text in own], n) for own in turns], np.float64)


def _distinct(utterances: Sequence[Sequence[str]], n: int) -> float:
    grams = [tuple(words[i : i + n]) for words in utterances for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
