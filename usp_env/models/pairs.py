"""How well does a text support a claim? Features of (claim, evidence) pairs on frozen MiniLM token states.

Evidence is a list of units (turns, sentences), in order. Three views of the same pair: sentence vectors (what is it about),
late interaction (for each token of the claim its best match in the evidence: Khattab and Zaharia, SIGIR 2020), and names and
numbers, which either occur or do not. A claim with one detail changed keeps the first, and loses in the other two.

Of a unit only the first 94 word pieces are compared: 57 of the 812 user turns of the packaged bank's `test` split are longer, and
15 % of all their word pieces are never read. Names and numbers are looked for in its first 1,200 characters.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError
from usp_env.models import embedders
from usp_env.models.features import check_unicode, normalise

Array = npt.NDArray[Any]
MAX_TOKENS = 96  # a unit is cut after this many word pieces (two of them special), and before that after MAX_CHARS
MAX_CHARS = 1200
LOW_LAYER = 2  # words keep their identity there; in the last layer they take on that of their sentence
BATCH_SIZE = 64

_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*")
_NAME = re.compile(r"(?<=[^.!?:\s]\s)[\"'(“]?([A-Z][\w.+#/-]*|[a-z]+[A-Z]\w*|\w*\d\w*[A-Za-z]\w*|\w+_\w+)")
_NUMERALS = {
    word: str(k)
    for k, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
    )
} | {"twenty": "20", "thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "twice": "2", "once": "1"}
_NOT_NAMES = frozenset("i english ai chatgpt you".split())
_EARLY = re.compile(r"\b(?:first|begin|start|open|initially|opening|at first)\w*\b", re.IGNORECASE)
_LATE = re.compile(r"\b(?:finally|lastly|last|end|close|finish|at last|eventually|later|afterwards|conclude)\b", re.IGNORECASE)
_THEN = re.compile(r"\b(?:then|next|after|before|once|again|follow\w*)\b", re.IGNORECASE)

FEATURES = (
    "cos max", "cos second", "cos mean", "cos of mean", "align", "align idf", "align low", "align worst", "align best unit",
    "low align", "low align idf", "low align low", "low align worst", "covered", "covered best unit", "uncovered worst",
    "back align", "back low align", "back covered", "names", "names missing", "numbers", "numbers missing", "claim length",
    "evidence length", "order", "place", "early", "late", "then", "early x place", "late x place", "then x order",
)  # fmt: skip

LEXICAL = tuple(
    FEATURES.index(name)
    for name in "covered/covered best unit/uncovered worst/back covered/names/names missing/numbers/numbers missing/claim length/"
    "evidence length/early/late/then".split("/")
)
"""Columns that need no model, only word pieces."""


class TextState(NamedTuple):
    """A text as MiniLM and the reader of names see it; t word pieces without the special ones.

    Attributes:
        text: What was read.
        vector: Sentence embedding, (384,), norm 1.
        last: Token states of the last layer, (t, 384), norm 1.
        low: Token states of layer `LOW_LAYER`, (t, 384), norm 1.
        ids: Word piece ids, (t,).
    """

    text: str
    vector: Array
    last: Array
    low: Array
    ids: Array


class StateReader:
    """Texts to `TextState`, with a bounded memory of the last ones.

    Args:
        embedder: A `TransformerEmbedder` (MiniLM).
        cache_size: Texts kept; one of 30 word pieces takes about 46 kB.
    """

    def __init__(self, embedder: embedders.TransformerEmbedder, cache_size: int = 4000) -> None:
        # The same weights serve both: a second copy of the encoder would double the memory.
        self._model, self._tokenizer = embedder._model, embedder._tokenizer
        self._cache: OrderedDict[str, TextState] = OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> list[TextState]:
        """One state per text, in order."""
        if isinstance(texts, str):
            raise SpecError(f"expected a list of texts, got one str {texts!r:.80}: pass [text]")
        check_unicode(texts)
        with self._lock:
            found = {text: self._cache[text] for text in set(texts) if text in self._cache}
            new = sorted(set(texts) - found.keys(), key=lambda text: (len(text), text))
            for start in range(0, len(new), BATCH_SIZE):
                batch = new[start : start + BATCH_SIZE]
                found.update(zip(batch, self._read(batch), strict=True))
            for text in texts:
                self._cache[text] = found[text]
                self._cache.move_to_end(text)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return [found[text] for text in texts]

    def _read(self, texts: list[str]) -> list[TextState]:
        import torch

        clean = [normalise(text)[:MAX_CHARS] for text in texts]
        encoded = self._tokenizer(clean, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
        ids, mask = encoded["input_ids"].to(self._model.device), encoded["attention_mask"].to(self._model.device)
        with torch.inference_mode():
            out = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            mean = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors = torch.nn.functional.normalize(mean, dim=-1).float().cpu().numpy()
            last, low = (
                torch.nn.functional.normalize(h, dim=-1).to(torch.float16).cpu().numpy()
                for h in (out.last_hidden_state, out.hidden_states[LOW_LAYER])
            )
        rows = [slice(1, int(n) - 1) for n in mask.sum(1)]  # without [CLS] and [SEP]
        pieces = ids.cpu().numpy()
        return [
            TextState(clean[i], vectors[i], last[i, row].copy(), low[i, row].copy(), pieces[i, row].copy())
            for i, row in enumerate(rows)
        ]


class WordReader:
    """`StateReader` without the model: word pieces only, all vectors 1. Of the features only `LEXICAL` mean anything."""

    def __init__(self, embedder: embedders.TransformerEmbedder) -> None:
        self._tokenizer = embedder._tokenizer
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> list[TextState]:
        """One state per text, in order."""
        if not texts:
            return []
        check_unicode(texts)
        clean = [normalise(text)[:MAX_CHARS] for text in texts]
        with self._lock:
            rows = self._tokenizer(clean, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        ids = [np.array(row[1:-1], dtype=np.int64) for row in rows]
        one = np.ones(1, np.float32)
        return [TextState(text, one, np.ones((len(k), 1)), np.ones((len(k), 1)), k) for text, k in zip(clean, ids, strict=True)]


@cache
def word_reader() -> WordReader:
    """The process's reader of word pieces."""
    embedder = embedders.load("minilm")
    assert isinstance(embedder, embedders.TransformerEmbedder)
    return WordReader(embedder)


@cache
def reader() -> StateReader:
    """The process's reader of packaged MiniLM.

    Raises:
        MissingAssetError: MiniLM has not been fetched.
    """
    embedder = embedders.load("minilm")
    assert isinstance(embedder, embedders.TransformerEmbedder)
    return StateReader(embedder)


def pair_features(claim: TextState, evidence: Sequence[TextState], idf: Array) -> Array:
    """`FEATURES` of one pair: (33,) float32; zeros where claim or evidence is empty.

    Args:
        claim: What is said.
        evidence: What should support it, in order.
        idf: Weight of each word piece, (vocabulary,), see `training.verifiers`.
    """
    units = [unit for unit in evidence if len(unit.ids)]
    if not units or not len(claim.ids):
        return np.zeros(len(FEATURES), np.float32)
    place = np.concatenate([np.full(len(unit.ids), k) for k, unit in enumerate(units)])
    weight = idf[claim.ids].astype(np.float64)
    weight = weight / max(weight.sum(), 1e-9)
    vectors = np.stack([unit.vector for unit in units])
    cosines = np.sort(vectors @ claim.vector)[::-1]
    mean = vectors.mean(0)
    last = claim.last.astype(np.float32) @ np.concatenate([unit.last for unit in units]).astype(np.float32).T  # (t, T)
    low = claim.low.astype(np.float32) @ np.concatenate([unit.low for unit in units]).astype(np.float32).T
    best, low_best = last.max(1), low.max(1)
    heavy = weight >= np.median(weight)  # the half of the claim that carries its content
    ids = np.concatenate([unit.ids for unit in units])
    inside = np.isin(claim.ids, ids)
    by_unit = [inside_unit @ weight for inside_unit in (np.isin(claim.ids, unit.ids) for unit in units)]
    starts = np.searchsorted(place, np.arange(len(units)))
    unit_best = np.maximum.reduceat(last, starts, axis=1).mean(0)  # (units,)
    back = _back(last, idf[ids], starts), _back(low, idf[ids], starts)
    covered_back = np.add.reduceat(idf[ids] * np.isin(ids, claim.ids), starts) / np.maximum(
        np.add.reduceat(idf[ids], starts), 1e-9
    )
    order, centre = _order(low, low_best, weight, place, len(units))
    names, numbers = _missing(claim.text, " ".join(unit.text for unit in units))
    cues = [float(cue.search(claim.text) is not None) for cue in (_EARLY, _LATE, _THEN)]
    return np.array([
        cosines[0], cosines[min(1, len(units) - 1)], cosines.mean(), mean @ claim.vector / max(float(np.linalg.norm(mean)), 1e-9),
        best.mean(), best @ weight, np.sort(best[heavy])[:3].mean(), best[heavy].min(), unit_best.max(),
        low_best.mean(), low_best @ weight, np.sort(low_best[heavy])[:3].mean(), low_best[heavy].min(),
        inside @ weight, max(by_unit), np.max(np.where(inside, 0, idf[claim.ids])),
        back[0], back[1], covered_back.max(), *names, *numbers, np.log1p(len(claim.ids)), np.log1p(len(ids)),
        order, centre, *cues, cues[0] * centre, cues[1] * centre, cues[2] * order,
    ], np.float32)  # fmt: skip


def _back(similarity: Array, weight: Array, starts: Array) -> float:
    """The best unit's weighted mean of its tokens' best match in the claim."""
    each = similarity.max(0) * weight
    return float(np.max(np.add.reduceat(each, starts) / np.maximum(np.add.reduceat(weight, starts), 1e-9)))


def _order(similarity: Array, best: Array, weight: Array, place: Array, units: int) -> tuple[float, float]:
    """Correlation of a token's place in the claim with its match's in the evidence, and the matches' mean place in [0, 1]."""
    trust = weight * np.maximum(best - 0.5, 0)
    if units < 2 or trust.sum() <= 0:
        return 0.0, 0.0 if units < 2 else 0.5
    trust = trust / trust.sum()
    y = place[similarity.argmax(1)] / (units - 1)
    x = np.linspace(0, 1, len(y))
    dx, dy = x - trust @ x, y - trust @ y
    spread = float(np.sqrt((trust @ dx**2) * (trust @ dy**2)))
    return (float(trust @ (dx * dy)) / spread if spread > 1e-6 else 0.0), float(trust @ y)


def names_of(text: str) -> list[str]:
    """Names of tools, people, places, identifiers: what is capitalised inside a sentence, or spelt like code.

    Example:
        >>> names_of("You debug a QVariantMap in VSCode on Windows.")
        ['QVariantMap', 'VSCode', 'Windows']
    """
    found = (match.rstrip(".,;:'\"-/") for match in _NAME.findall(text))
    return [name for name in found if name.casefold() not in _NOT_NAMES and not name.isdigit()]


def numbers_of(text: str) -> list[str]:
    """Numbers as digits, number words included.

    Example:
        >>> numbers_of("three drafts of 1,200 words")
        ['3', '1200']
    """
    spelled = re.sub(r"[a-z]+", lambda match: _NUMERALS.get(match[0], match[0]), text.casefold())
    return [number.replace(",", "").rstrip(".") for number in _NUMBER.findall(spelled)]


def _missing(claim: str, evidence: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """(how many, how many that the evidence lacks) of the claim's names and of its numbers, capped at 3."""
    folded = re.sub(r"[\s_-]+", "", evidence.casefold())
    names = {re.sub(r"[\s_-]+", "", name.casefold()).removesuffix("'s") for name in names_of(claim)}
    numbers, known = set(numbers_of(claim)), set(numbers_of(evidence))
    lost = sum(name not in folded for name in names), len(numbers - known)
    return (min(len(names), 3), min(lost[0], 3)), (min(len(numbers), 3), min(lost[1], 3))
