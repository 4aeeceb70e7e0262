"""P.Cover: how much of a profile's own wording comes up in what the user says (Song et al., IJCAI 2019).

    C = 1/N Σ_i max_j S(y_i, p_j)       S(y, p) = Σ_{w in W} idf_w / |W|       W: content words that y and p share

over a user's N turns y_i and the profile's sentences p_j; S is 0 where nothing is shared. With GloVe ranks (the = 1)

    idf_w = 1 / (1 + ln(1 + tf_w))      tf_w = 10⁶ / rank_w^1.07

so a frequent word weighs little (`the` .067), a rare one more (rank 400,000: .588), and C is never above 1. GloVe's 400,000
ranks are not shipped: the default table is the 22,000 words of BERT's uncased vocabulary, which is ordered by frequency in
Wikipedia and books, with GloVe's first seven ranks put right; pass `ranks` for the paper's own numbers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError
from usp_env.metrics.consistency import DialogueTurns, FloatArray, ProfileText
from usp_env.models.facts import sentences
from usp_env.models.features import FUNCTION_WORDS, words

EXPONENT = 1.07
SPECIAL_RANK = 0.1
"""Rank of tokens that are no words (padding, sentence marks) in the published table; no text holds them here."""
GLOVE_HEAD = {"the": 1, ",": 2, ".": 3, "of": 4, "to": 5, "and": 6, "i": 42}
"""Ranks of GloVe 6B that the shipped table lacks or has otherwise."""
UNKNOWN_RANK = 60_000
"""Of a word that the shipped table lacks: the median GloVe rank of ConvAI2's 7,295 such words is 61,000. GloVe's own: 400,000."""
STOP_WORDS = frozenset(FUNCTION_WORDS)
"""Words that are not counted as shared: articles, pronouns, auxiliaries, prepositions, courtesies (110 of them)."""


def idf(rank: npt.ArrayLike) -> FloatArray:
    """Weight of words by their frequency rank (1 is the most frequent): same shape, in (0, 1).

    Example:
        >>> idf([1, 42, 0.1]).round(6)
        array([0.067497, 0.092453, 0.057873])
    """
    tf = 1e6 / np.asarray(rank, dtype=np.float64) ** EXPONENT
    return np.asarray(1.0 / (1.0 + np.log1p(tf)), dtype=np.float64)


@cache
def default_ranks() -> Mapping[str, int]:
    """The shipped table, word to rank; read once a process."""
    record = json.loads((resources.files("usp_env.data") / "word_ranks.json").read_text("utf-8"))
    first = 3  # GloVe has a comma and a full stop after `the`
    return {word: k + first for k, word in enumerate(record["words"].split())} | GLOVE_HEAD


def persona_coverage(
    dialogues: Sequence[DialogueTurns],
    profiles: Sequence[ProfileText],
    ranks: Mapping[str, float] | None = None,
    unknown_rank: float | None = None,
    stop_words: Collection[str] = STOP_WORDS,
) -> FloatArray:
    """P.Cover of `n` people.

    Case is ignored; `dog's` counts as `dog`, and `you're` is a stop word as `you` is.

    Args:
        dialogues: What each user said, (n,).
        profiles: The profile each was given, (n,); its sentences are the p_j.
        ranks: Word (lower case) to frequency rank; None is the shipped table.
        unknown_rank: Of words that are not in the table; None is `UNKNOWN_RANK` for the shipped table, else the rank after the
            table's last.
        stop_words: Lower case; not counted as shared.

    Returns:
        (n,), in [0, 1); NaN where the user or the profile says nothing.

    Raises:
        SpecError: The lists differ in length, or a rank is not above 0.

    Example:
        >>> talk = DialogueTurns(("How do I clean leeks?", "thanks"))
        >>> persona_coverage([talk], [ProfileText("You like leeks. You sew.")], ranks={"leeks": 42}).round(4)
        array([0.0462])
    """
    if len(dialogues) != len(profiles):
        raise SpecError(f"expected one profile for each dialogue, got {len(dialogues)} dialogues and {len(profiles)} profiles")
    table = default_ranks() if ranks is None else ranks
    last = UNKNOWN_RANK if ranks is None else max(table.values(), default=0) + 1
    unknown = last if unknown_rank is None else unknown_rank
    if unknown <= 0 or min(table.values(), default=1) <= 0:
        raise SpecError("ranks: expected every rank, and unknown_rank, to be above 0")
    return np.array(
        [
            _coverage(dialogue.turns, sentences(profile.prose), table, unknown, stop_words)
            for dialogue, profile in zip(dialogues, profiles, strict=True)
        ],
        dtype=np.float64,
    )


def _coverage(
    turns: Sequence[str], persona: Sequence[str], ranks: Mapping[str, float], unknown: float, stop_words: Collection[str]
) -> float:
    said = [_content(turn, stop_words) for turn in turns if turn.strip()]
    known = [_content(sentence, stop_words) for sentence in persona]
    if not said or not known:
        return float("nan")
    vocabulary = sorted({word for text in said for word in text} & {word for text in known for word in text})
    weight = dict(zip(vocabulary, idf([ranks.get(word, unknown) for word in vocabulary]), strict=True))
    best = [max(_similarity(turn & sentence, weight) for sentence in known) for turn in said]
    return float(np.mean(best))


def _similarity(shared: set[str], weight: Mapping[str, float]) -> float:
    return float(np.mean([weight[word] for word in sorted(shared)])) if shared else 0.0


def _content(text: str, stop_words: Collection[str]) -> set[str]:
    found = set()
    for token in words(text):
        word = token.casefold()
        stem = word.partition("'")[0]
        if word[0].isalnum() and word not in stop_words and stem not in stop_words:
            found.add(stem)
    return found
