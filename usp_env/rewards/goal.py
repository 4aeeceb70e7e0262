"""GoalProgress: how much of what the user came for has the assistant answered?

The user's requests are the details d_1..d_m of the profile. Detail i is *raised* at the first user turn that a scorer
recognises it in. From then on

    c_i(t) = max over the reply sentences up to turn t of p(the sentence answers d_i)        Φ_t = (1/m) Σ_i c_i(t)

and a step pays Φ_t − Φ_{t−1} (Φ_0 = 0), so that an episode's return is its last Φ, in [0, 1]. A detail that the user never
raises counts as 0. Two guards: a sentence copied from the user turns before it answers nothing, and only the first
8 other sentences of a reply count. Both look backwards only, so Φ never falls.

p comes from a named scorer. `answer-v1` is trained to tell answers from echoes, keyword heaps, stock phrases and other topics
(`training/verifiers.py`, card `docs/models/answer_verifier.md`). `minilm-v0` is similarity with a calibrated zero
(`training/goal_scorer.py`, card `usp_env/models/GOAL_SCORER.md`): it takes an echo in other words for an answer.
`answer-v1-twin`, trained on other conversations, is for evaluation only: no model is trained by it, so claims are judged by it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError, UnknownNameError
from usp_env.models import embedders
from usp_env.profiles import Profile
from usp_env.records import RewardTerms
from usp_env.rewards.base import When

MAX_SENTENCES = 8
NGRAM = 4
MAX_OVERLAP = 0.5
SCORERS = ("minilm-v0", "answer-v1", "answer-v1-twin")
DEFAULT = "answer-v1"

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_FENCE = re.compile(r"(```.*?(?:```|\Z))", re.DOTALL)
_MARKER = re.compile(r"^\s*(?:(?:[-*•#>]+|\d+[.)])\s+)+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


class Scorer(Protocol):
    """Judges pairs of texts.

    Attributes:
        name: Recorded on cards.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see Attributes

    def __call__(self, sentences: Sequence[str], requests: Sequence[str]) -> npt.NDArray[Any]:
        """p(sentence answers request) of `n` pairs: (n,), in [0, 1]."""
        ...

    def raised(self, utterances: Sequence[str], requests: Sequence[str]) -> npt.NDArray[Any]:
        """Whether the user's utterance makes the request, of `n` pairs: (n,), bool."""
        ...


@dataclass(frozen=True, slots=True)
class Calibration:
    """What turns cosines into judgements; fitted by `training/goal_scorer.py`.

    Args:
        zero: Cosine up to which p is 0: what unrelated conversations reach.
        one: Cosine from which p is 1: what a typical real answer reaches.
        raised: Cosine from which a user turn makes a request.
    """

    zero: float
    one: float
    raised: float

    def probability(self, cosines: FloatArray) -> FloatArray:
        """Map cosines, any shape, to p = clip((cos − zero) / (one − zero), 0, 1)."""
        p: FloatArray = np.clip((cosines - self.zero) / (self.one - self.zero), 0.0, 1.0)
        return p

    @classmethod
    def load(cls, name: str) -> Calibration:
        """The shipped calibration of a scorer."""
        record = json.loads((resources.files("usp_env.models") / f"goal-{name}.json").read_text("utf-8"))
        return cls(record["zero"], record["one"], record["raised"])


class SimilarityScorer:
    """Calibrated cosine of sentence embeddings.

    Args:
        name: See `Scorer`.
        embedder: Texts to unit vectors, (n, d); called once per call with the distinct texts it has not seen lately.
        calibration: See `Calibration`.
        cache_size: Most embeddings kept between calls (Φ is evaluated again after every turn). 20,000 MiniLM vectors: 31 MB.

    Example:
        >>> axes = {"a": [1, 0], "b": [0.6, 0.8], "c": [0, 1]}
        >>> scorer = SimilarityScorer("toy", lambda texts: np.array([axes[t] for t in texts]), Calibration(0.5, 0.7, 0.9))
        >>> scorer(["a", "b", "c"], ["a", "a", "a"]).round(3), scorer.raised(["a", "b"], ["a", "a"])
        (array([1. , 0.5, 0. ]), array([ True, False]))
    """

    def __init__(self, name: str, embedder: Any, calibration: Calibration, cache_size: int = 20_000) -> None:
        self.name, self.calibration = name, calibration
        self._embedder, self._cache_size = embedder, cache_size
        self._cache: OrderedDict[str, npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, sentences: Sequence[str], requests: Sequence[str]) -> FloatArray:
        """See `Scorer`."""
        return self.calibration.probability(self.cosine(sentences, requests))

    def raised(self, utterances: Sequence[str], requests: Sequence[str]) -> BoolArray:
        """See `Scorer`."""
        hits: BoolArray = self.cosine(utterances, requests) >= self.calibration.raised
        return hits

    def cosine(self, left: Sequence[str], right: Sequence[str]) -> FloatArray:
        """Cosine of `n` pairs: (n,), to three decimals.

        A text's vector differs by 1e-7 with what shares its batch; rounded, a reward is the same in 1 and 64 environments.
        """
        if not left:
            return np.zeros(0)
        vectors = self._embed([*left, *right])
        a, b = (np.stack([vectors[text] for text in side]) for side in (left, right))
        cosines: FloatArray = np.round(np.einsum("nd,nd->n", a, b, dtype=np.float64), 3)
        return cosines

    def _embed(self, texts: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        with self._lock:
            found = {text: self._cache.get(text) for text in texts}
            new = [text for text, vector in found.items() if vector is None]
            if new:
                found.update(zip(new, self._embedder(new), strict=True))
            for text, vector in found.items():
                self._cache[text] = vector  # type: ignore[assignment]
                self._cache.move_to_end(text)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return found  # type: ignore[return-value]


@cache
def load_scorer(name: str) -> Scorer:
    """The scorer of this name, loaded once a process.

    Raises:
        UnknownNameError: No such scorer.
        MissingAssetError: Its embedder is not on this machine.
        MissingExtraError: torch or transformers is not installed.
    """
    if name not in SCORERS:
        raise UnknownNameError("goal scorer", name, SCORERS)
    if name.startswith("answer-v1"):
        from usp_env.models import scorers

        answers: Scorer = scorers.load(name)
        return answers
    return SimilarityScorer(name, embedders.load("minilm"), Calibration.load(name))


@dataclass(frozen=True)
class GoalProgress:
    """The reward `goal` of the assistant's seat; see the module's docstring.

    Args:
        scorer: A name or an object; None is `answer-v1`.

    Example:
        >>> class Contains:  # answers: holds the request's last word; raised: is the request
        ...     name = "contains"
        ...     def __call__(self, sentences, requests):
        ...         return np.array([float(r.split()[-1] in s) for s, r in zip(sentences, requests)])
        ...     def raised(self, utterances, requests):
        ...         return np.array([u == r for u, r in zip(utterances, requests)])
        >>> person = Profile("a", "Name the capital. Name the river.", "You are terse.")
        >>> said = [("user", "Name the capital."), ("assistant", "Gladly. It is the capital. Paris."), ("user", "Thanks.")]
        >>> talk = Dialogue.of({"role": role, "content": text} for role, text in said)
        >>> GoalProgress(Contains())([person], [talk])[0].value
        0.5
    """

    scorer: Scorer | str | None = None
    name: str = "goal"
    when: When = "turn"

    def __post_init__(self) -> None:
        self._live()  # what is missing should be told when the reward is made, not at the first step

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides the value besides profile and dialogue."""
        return {"scorer": self._live().name}

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | None]:
        """Φ of each dialogue so far as the term `goal`, in [0, 1]; None where the profile has no details."""
        scorer, details = self._live(), [details_of(profile) for profile in profiles]
        starts = _raised_at(scorer, details, dialogues)
        best = _answered(scorer, details, dialogues, starts)
        return [RewardTerms(dialogue={self.name: float(np.mean(c))}) if len(c) else None for c in best]

    @property
    def twin(self) -> GoalProgress | None:
        """The same reward by the held-out scorer; None where there is none."""
        name = f"{self._live().name}-twin"
        return GoalProgress(name, self.name, self.when) if name in SCORERS else None

    def _live(self) -> Scorer:
        # A scorer given by name stays a name here: environments copy and pickle their settings.
        return load_scorer(self.scorer or DEFAULT) if isinstance(self.scorer, str | None) else self.scorer


def details_of(profile: Profile) -> tuple[str, ...]:
    """What the person wants: the task details, else the sentences of the objective facts.

    The sentences stand in for atomic facts: some of them describe the person and ask for nothing, so that Φ stays
    below 1 for a profile without attributes.
    """
    details = tuple(detail for detail in profile.task_details if detail.strip())
    return details or tuple(sentences(profile.objective))


def sentences(text: str) -> list[str]:
    r"""Split a text into sentences: at line ends and after . ! ?; a code block is one sentence, list markers go.

    Example:
        >>> sentences("Two ways:\n1. Use a list. It is short!\n- Use a dict")
        ['Two ways:', 'Use a list.', 'It is short!', 'Use a dict']
    """
    found: list[str] = []
    for part in _FENCE.split(text):
        lines = [part] if part.startswith("```") else [_MARKER.sub("", line) for line in part.split("\n")]
        for line in lines:
            found += [line] if part.startswith("```") else _SENTENCE_END.split(line)
    return [sentence.strip() for sentence in found if re.search(r"\w", sentence)]


def overlap(sentence: str, sources: Sequence[str]) -> float:
    """Share of a sentence's word 4-grams that occur in one of the sources, in [0, 1]; case and punctuation do not count.

    A sentence of n < 4 words is one n-gram.

    Example:
        >>> overlap("What is the capital of France?", ["Tell me: what is the capital of Spain?"])
        0.6666666666666666
    """
    words = _words(sentence)
    size = min(NGRAM, len(words))
    grams = _ngrams(words, size)
    if not grams:
        return 0.0
    known = set().union(*(_ngrams(_words(source), size) for source in sources))
    return sum(gram in known for gram in grams) / len(grams)


@lru_cache(maxsize=8192)
def candidates(reply: str, said: tuple[str, ...]) -> tuple[str, ...]:
    """The sentences of a reply that may answer something: the first 8 not copied from what the user said before."""
    own = (sentence for sentence in sentences(reply) if overlap(sentence, said) <= MAX_OVERLAP)
    return tuple(sentence for sentence, _ in zip(own, range(MAX_SENTENCES), strict=False))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if size else []


def _raised_at(scorer: Scorer, details: Sequence[Sequence[str]], dialogues: Sequence[Dialogue]) -> list[list[int | None]]:
    """For each detail of each dialogue the index of the message that raises it, or None."""
    pairs = [
        (n, i, k, message.content, request)
        for n, dialogue in enumerate(dialogues)
        for k, message in enumerate(dialogue)
        if message.role == "user"
        for i, request in enumerate(details[n])
    ]
    starts: list[list[int | None]] = [[None] * len(own) for own in details]
    hits = _checked(scorer, scorer.raised([p[3] for p in pairs], [p[4] for p in pairs]), len(pairs))
    for (n, i, k, _, _), hit in zip(pairs, hits, strict=True):
        if hit and starts[n][i] is None:  # pairs run in the order of the messages
            starts[n][i] = k
    return starts


def _answered(
    scorer: Scorer, details: Sequence[Sequence[str]], dialogues: Sequence[Dialogue], starts: Sequence[Sequence[int | None]]
) -> list[FloatArray]:
    """c_i of each dialogue, shape (m,)."""
    pairs = [
        (n, i, sentence, request)
        for n, dialogue in enumerate(dialogues)
        for k, message in enumerate(dialogue)
        if message.role == "assistant"
        for i, request in enumerate(details[n])
        if (start := starts[n][i]) is not None and start < k
        for sentence in candidates(message.content, tuple(m.content for m in dialogue.messages[:k] if m.role == "user"))
    ]
    best = [np.zeros(len(own)) for own in details]
    scores = _checked(scorer, scorer([p[2] for p in pairs], [p[3] for p in pairs]), len(pairs))
    for (n, i, _, _), p in zip(pairs, scores, strict=True):
        best[n][i] = max(best[n][i], p)
    return best


def _checked(scorer: Scorer, values: Any, n: int) -> FloatArray:
    array = np.asarray(values, dtype=float)
    if array.shape != (n,) or not np.all((array >= 0) & (array <= 1)):
        raise SpecError(f"goal scorer {scorer.name!r}: expected {n} values in [0, 1], got {array!r:.120} of shape {array.shape}")
    return array
