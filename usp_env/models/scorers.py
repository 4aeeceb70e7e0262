"""The small trained models that ship, ready to score: human-likeness, style, facts, answers.

    load("human-v1")(["Sure, here is a list:", "pls make it shorter"])          P(human), (n,)
    load("style-v1")(["pls make it shorter"])                                   style vectors, (n, d), norm 1
    load("facts-v1").supported([["how do i sort in go"]], ["You use Go."])      p(user turns support the fact), (n,)
    load("facts-v1").explains(["You use Go."], ["how do i sort in go"])         p(profile supports the turn), (n,)
    load("answer-v1")(["Use sort.Slice."], ["Ask how to sort in Go"])           p(sentence answers the request), (n,)

`load("human-v1-twin")` and so on give another family trained on other conversations, for evaluation only. Weights are
float16 safetensors beside this file; numbers are computed with numpy, and only texts' MiniLM states need torch. Cards:
`docs/models/`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from usp_env.errors import MissingAssetError, SpecError, UnknownNameError, require
from usp_env.models import facts, features, pairs

NAMES = ("human-v1", "human-v1-twin", "style-v1", "facts-v1", "facts-v1-twin", "answer-v1", "answer-v1-twin")
BLOCK = 256  # pairs whose texts' states are held at a time
MEMORY = 50_000  # pairs whose score an answer scorer remembers: goal progress asks for the same ones after every turn

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
Reader = Callable[[Sequence[str]], list[pairs.TextState]]


@dataclass(frozen=True)
class Head:
    """A standardised multi-layer perceptron with ReLU; one layer makes it a linear model.

    Args:
        mean: Subtracted from the features, (f,).
        scale: What they are then divided by, (f,).
        layers: (weights (in, out), bias (out,)) each; the last has one output.

    Example:
        >>> head = Head(np.zeros(2), np.ones(2), ((np.array([[1.0], [-1.0]]), np.array([0.5])),))
        >>> head(np.array([[2.0, 1.0]])).tolist()
        [1.5]
    """

    mean: Array
    scale: Array
    layers: tuple[tuple[Array, Array], ...]

    @classmethod
    def read(cls, tensors: dict[str, Array], prefix: str) -> Head:
        """The head whose tensors are `PREFIX.mean`, `PREFIX.scale`, `PREFIX.w0`, `PREFIX.b0` and so on."""
        wide = {key: value.astype(np.float64) for key, value in tensors.items() if key.startswith(prefix + ".")}
        depth = sum(key.startswith(f"{prefix}.w") for key in wide)
        layers = tuple((wide[f"{prefix}.w{k}"], wide[f"{prefix}.b{k}"]) for k in range(depth))
        return cls(wide[f"{prefix}.mean"], wide[f"{prefix}.scale"], layers)

    def __call__(self, x: Array) -> FloatArray:
        """Logits of `n` rows: (n, f) to (n,)."""
        hidden = np.clip((x - self.mean) / self.scale, -6, 6)  # what is far outside the training data counts as its edge
        for k, (weights, bias) in enumerate(self.layers):
            hidden = hidden @ weights + bias
            if k + 1 < len(self.layers):
                hidden = np.maximum(hidden, 0)
        logits: FloatArray = hidden[:, 0]
        return logits


def sigmoid(logits: Array) -> FloatArray:
    """1 / (1 + e^-x), to four decimals: a text's MiniLM state differs by 1e-7 with what shares its batch."""
    p: FloatArray = np.round(1 / (1 + np.exp(-np.clip(logits, -30, 30))), 4)
    return p


class HumanLikeness:
    """P(human) of single utterances, from hashed words, hashed characters and habits of the hand; the twin reads the last alone.

    Args:
        name: Of the weights; one that ends in `twin` has no n-grams.
        tensors: See `training.human_likeness`.
        meta: `platt`, the scale and shift that calibrate the logits.
    """

    def __init__(self, name: str, tensors: dict[str, Array], meta: dict[str, Any]) -> None:
        self.name, self.meta, self.tensors = name, meta, tensors

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """P(human) of `n` utterances, each on its own: (n,), in [0, 1], calibrated on held-out conversations."""
        a, b = self.meta["platt"]
        return sigmoid(a * self.raw(self.name, self.tensors, texts) + b)

    @staticmethod
    def raw(name: str, tensors: dict[str, Array], texts: Sequence[str]) -> FloatArray:
        """Logits before calibration, (n,)."""
        if isinstance(texts, str):
            raise SpecError(f"expected a list of texts, got one str {texts!r:.80}: pass [text]")
        if not texts:
            return np.zeros(0)
        head = Head.read(tensors, "dense")
        if name.endswith("twin"):
            return head(features.surface(texts))
        words, chars = tensors["words"], tensors["chars"]
        sparse = features.hashed_words(texts, len(words)).dot(words) + features.hashed_chars(texts, len(chars)).dot(chars)
        return sparse + head(features.surface(texts))


class StyleEncoder:
    """How a text is written, as a unit vector: a linear discriminant of habits of the hand, function words and length.

    Attributes:
        name: Of the weights.
        dim: Length of a vector.
        threshold: Cosine from which two texts count as one author's (Youden's on `val`), for AVA.
    """

    def __init__(self, name: str, tensors: dict[str, Array], meta: dict[str, Any]) -> None:
        self.name, self.meta = name, meta
        self.threshold = float(meta["threshold"])
        self._mean, self._scale, self._projection = (tensors[key].astype(np.float64) for key in ("mean", "scale", "projection"))
        self.dim = int(self._projection.shape[1])

    def __call__(self, texts: Sequence[str]) -> Array:
        """Embed `n` texts: (n, dim) float32, rows of norm 1; their dot product is the style similarity."""
        if isinstance(texts, str):
            raise SpecError(f"expected a list of texts, got one str {texts!r:.80}: pass [text]")
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        out = self.standardise(style_dense(texts), self._mean, self._scale) @ self._projection
        unit: Array = (out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)).astype(np.float32)
        return unit

    @staticmethod
    def standardise(dense: Array, mean: Array, scale: Array) -> FloatArray:
        """Rows less their mean in units of scale, (n, f); what is rarer than five of them counts as five."""
        rows: FloatArray = np.clip((dense - mean) / scale, -5, 5)
        return rows


def style_dense(texts: Sequence[str]) -> Array:
    """What `StyleEncoder` reads: `features.surface` (habits, function words), length and `features.habits`, (n, f)."""
    length = np.log1p([[len(text), text.count(" ")] for text in texts])
    return np.hstack([features.surface(texts), length, features.habits(texts)])


class FactVerifier:
    """Does a text support a claim? Two questions, one set of features (`usp_env.models.pairs`), two heads.

    Args:
        name: Of the weights.
        tensors: See `training.verifiers`.
        meta: What the weights' header says.
        read: Texts to `TextState`.
    """

    def __init__(self, name: str, tensors: dict[str, Array], meta: dict[str, Any], read: Reader) -> None:
        self.name, self.meta = name, meta
        self._idf = tensors["idf"].astype(np.float64)
        self._heads = {key: Head.read(tensors, key) for key in ("fact", "turn")}
        self._read = read

    def supported(self, turns: Sequence[Sequence[str]], facts: Sequence[str]) -> FloatArray:
        """p(the user's turns support the fact) of `n` pairs.

        Args:
            turns: A dialogue's user turns for each pair, in order; those of one dialogue may be passed many times.
            facts: An atomic statement for each pair (`usp_env.models.facts.atomic_facts`).

        Returns:
            (n,), in [0, 1]; 0 where there are no turns.
        """
        return self._score("fact", facts, turns)

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> FloatArray:
        """p(the profile supports the user turn) of `n` pairs.

        Args:
            profiles: A profile's prose for each pair, both paragraphs.
            turns: One user utterance for each pair.

        Returns:
            (n,), in [0, 1]; 0 where either is blank.
        """
        return self._score("turn", turns, [profile_units(profile) for profile in profiles])

    def _score(self, head: str, claims: Sequence[str], evidence: Sequence[Sequence[str]]) -> FloatArray:
        if isinstance(claims, str) or len(claims) != len(evidence):
            raise SpecError(f"expected two lists of one length, got {claims!r:.60} and {evidence!r:.60}")
        if not claims:
            return np.zeros(0)
        p = sigmoid(self._heads[head](pair_matrix(self._read, self._idf, claims, evidence)))
        empty = [
            not claim.strip() or not any(unit.strip() for unit in units) for claim, units in zip(claims, evidence, strict=True)
        ]
        return np.where(empty, 0.0, p)


def profile_units(profile: str) -> list[str]:
    """The sentences of a profile: the units that a turn is compared with."""
    return facts.sentences(profile)


def pair_matrix(read: Reader, idf: Array, claims: Sequence[str], evidence: Sequence[Sequence[str]]) -> Array:
    """`pairs.FEATURES` of `n` pairs, (n, f); read in blocks, so that memory does not grow with n."""
    rows: list[Array] = []
    for start in range(0, len(claims), BLOCK):
        block = slice(start, start + BLOCK)
        texts = list(dict.fromkeys([*claims[block], *(unit for units in evidence[block] for unit in units)]))
        states = dict(zip(texts, read(texts), strict=True))
        for claim, units in zip(claims[block], evidence[block], strict=True):
            rows.append(pairs.pair_features(states[claim], [states[unit] for unit in units], idf))
    return np.array(rows).reshape(len(rows), len(pairs.FEATURES))


class AnswerScorer:
    """Does a sentence answer a request? A `usp_env.rewards.goal.Scorer`.

    Args:
        name: Of the weights.
        tensors: See `training.verifiers`.
        meta: `raised`, the probability from which a user turn counts as making a request; `gate`, see `about`.
        read: Texts to `TextState`.
    """

    def __init__(self, name: str, tensors: dict[str, Array], meta: dict[str, Any], read: Reader) -> None:
        self.name, self.meta = name, meta
        self._idf = tensors["idf"].astype(np.float64)
        self._heads = {key: Head.read(tensors, key) for key in ("answer", "raised")}
        self._read = read
        self._memory: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, sentences: Sequence[str], requests: Sequence[str]) -> FloatArray:
        """p(sentence answers request) of `n` pairs: (n,), in [0, 1]."""
        return self._remembered("answer", sentences, requests)

    def raised(self, utterances: Sequence[str], requests: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether the user's utterance makes the request, of `n` pairs: (n,), bool."""
        hits: npt.NDArray[np.bool_] = self.raising(utterances, requests) >= self.meta["raised"]
        return hits

    def raising(self, utterances: Sequence[str], requests: Sequence[str]) -> FloatArray:
        """p(the utterance makes the request) of `n` pairs: (n,), in [0, 1]."""
        return self._remembered("raised", utterances, requests)

    def _remembered(self, head: str, texts: Sequence[str], requests: Sequence[str]) -> FloatArray:
        keys = [(head, text, request) for text, request in zip(texts, requests, strict=True)]
        with self._lock:
            found = {key: self._memory[key] for key in set(keys) if key in self._memory}
            new = [key for key in dict.fromkeys(keys) if key not in found]
            if new:
                found.update(zip(new, self._score(head, [k[1] for k in new], [k[2] for k in new]), strict=True))
            for key in keys:
                self._memory[key] = found[key]
                self._memory.move_to_end(key)
            while len(self._memory) > MEMORY:
                self._memory.popitem(last=False)
        return np.array([found[key] for key in keys], dtype=np.float64)

    def _score(self, head: str, texts: Sequence[str], requests: Sequence[str]) -> FloatArray:
        x = pair_matrix(self._read, self._idf, requests, [[text] for text in texts])
        if head == "answer":
            x = np.hstack([x, answer_extras(self._read, self._idf, texts, requests)])
            return np.round(sigmoid(self._heads[head](x)) * about(x, self.meta.get("gate")), 4)
        return sigmoid(self._heads[head](x))


def about(x: Array, gate: Sequence[float] | None) -> FloatArray:
    """How far each sentence is about its request at all, (n,), in [0, 1]: σ(slope · (cosine − middle)); 1 without a gate.

    A network that knows answers from echoes and stock phrases trusts sentences about anything; this factor does not. The network
    alone is calibrated; its product with this is a score, lower than a probability, that keeps essays about something else down.

    Args:
        x: Features of the pairs (`pairs.FEATURES` first), (n, f).
        gate: Slope and middle.
    """
    if gate is None:
        return np.ones(len(x))
    slope, middle = gate
    return 1 / (1 + np.exp(-slope * (x[:, pairs.FEATURES.index("cos max")].astype(np.float64) - middle)))


ANSWER_EXTRAS = (
    "novelty", "repetition", "commonest piece", "function words", "question", "colon", "opener", "copied", "human", "length",
    "request is question", "shared order",
)  # fmt: skip


def answer_extras(read: Reader, idf: Array, sentences: Sequence[str], requests: Sequence[str]) -> Array:
    """What a pair's similarity does not show, (n, 12): does the sentence add anything, is it prose, is it a request itself?"""
    human = load("human-v1").raw("human-v1", load("human-v1").tensors, list(sentences))
    texts = list(dict.fromkeys([*sentences, *requests]))
    ids = {text: state.ids for text, state in zip(texts, read(texts), strict=True)}
    rows = [_answer_extras(s, r, ids[s], ids[r], idf) for s, r in zip(sentences, requests, strict=True)]
    out = np.array(rows).reshape(len(rows), len(ANSWER_EXTRAS))
    out[:, ANSWER_EXTRAS.index("human")] = np.clip(human / 4, -2, 2)
    return out


def _answer_extras(sentence: str, request: str, own: Array, asked: Array, idf: Array) -> list[float]:
    weight = idf[own]
    _, counts = np.unique(own, return_counts=True)
    total = max(len(own), 1)
    tokens = [token.casefold() for token in features.words(sentence) if token[0].isalnum()]
    known = [token.casefold() for token in features.words(request) if token[0].isalnum()]
    threes = {tuple(known[i : i + 3]) for i in range(len(known) - 2)}
    twos = {tuple(known[i : i + 2]) for i in range(len(known) - 1)}
    mine3, mine2 = (
        [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)],
        [tuple(tokens[i : i + 2]) for i in range(len(tokens) - 1)],
    )
    return [
        float(weight[~np.isin(own, asked)].sum() / max(weight.sum(), 1e-9)),
        1 - len(counts) / total, max(counts, default=0) / total,
        sum(token in features.FUNCTION_INDEX for token in tokens) / max(len(tokens), 1), float(sentence.rstrip().endswith("?")),
        float(sentence.rstrip().endswith(":")), float(features.OPENER.match(sentence.strip()) is not None),
        sum(gram in threes for gram in mine3) / max(len(mine3), 1), 0.0, float(np.log1p(len(tokens))),
        float(request.rstrip().endswith("?")), sum(gram in twos for gram in mine2) / max(len(mine2), 1),
    ]  # fmt: skip


@cache
def load(name: str) -> Any:
    """The shipped model of this name, loaded once a process.

    Args:
        name: One of `NAMES`.

    Returns:
        A `HumanLikeness`, `StyleEncoder`, `FactVerifier` or `AnswerScorer`.

    Raises:
        UnknownNameError: No such model.
        MissingAssetError: MiniLM has not been fetched.
        MissingExtraError: safetensors, torch or transformers is not installed.
    """
    if name not in NAMES:
        raise UnknownNameError("scorer", name, NAMES)
    tensors, meta = read_weights(name)
    kind = name.partition("-")[0]
    if kind == "human":
        return HumanLikeness(name, tensors, meta)
    if kind == "style":
        return StyleEncoder(name, tensors, meta)
    read = pairs.word_reader() if name.endswith("twin") else pairs.reader()
    return (FactVerifier if kind == "facts" else AnswerScorer)(name, tensors, meta, read)


def read_weights(name: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """Tensors and JSON metadata of `NAME.safetensors` beside this file.

    Raises:
        MissingAssetError: The file is not there.
    """
    path = Path(__file__).parent / f"{name}.safetensors"
    if not path.is_file():
        raise MissingAssetError(f"expected the shipped weights at {path}: install usp-env again, or train them (docs/models)")
    with require("safetensors", "hf").safe_open(path, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["usp_env"])
