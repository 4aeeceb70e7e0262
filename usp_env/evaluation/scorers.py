"""The models that score: each with the name that stands on the card, and its held-out twin where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from usp_env.metrics.consistency import Verifier
from usp_env.metrics.judges import Judge
from usp_env.rewards.human_likeness import TextScorer

Embed = Callable[[Sequence[str]], npt.NDArray[Any]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scorer(Generic[T]):
    """A model and its twin.

    Args:
        model: What rewards use.
        name: On the card.
        twin: Of another family, or trained on other conversations; no reward uses it. None where there is none.
        twin_name: On the card.
    """

    model: T
    name: str
    twin: T | None = None
    twin_name: str | None = None

    def both(self) -> list[tuple[T, str]]:
        """The model and, where there is one, its twin, with their names."""
        return [(self.model, self.name)] + ([(self.twin, self.twin_name or "twin")] if self.twin is not None else [])


class Remembered:
    """An embedder that reads each text once: real turns come again with every user, joined ones with every metric.

    Example:
        >>> asked = []
        >>> embed = Remembered(lambda texts: asked.extend(texts) or np.array([[float(len(text))] for text in texts]))
        >>> embed(["a", "bb", "a"]).tolist(), embed(["bb"]).tolist(), asked
        ([[1.0], [2.0], [1.0]], [[2.0]], ['a', 'bb'])
    """

    def __init__(self, embed: Embed) -> None:
        self._embed = embed
        self._known: dict[str, npt.NDArray[Any]] = {}

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[Any]:
        """Vectors of `n` texts, (n, d)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new or not texts:
            found = self._embed(new)
            self._known.update(zip(new, found, strict=True))
        return np.stack([self._known[text] for text in texts]) if texts else np.asarray(found)


@dataclass(frozen=True, slots=True)
class Scorers:
    """All that an evaluation asks.

    Args:
        embed: Texts to unit vectors, for what is meant.
        style: Texts to unit vectors, for how it is written.
        style_threshold: Cosine from which two texts count as one author's.
        human: Texts to P(human).
        facts: Does a text support a claim?
        judge: For SC.Score; None: it is not measured.
    """

    embed: Scorer[Embed]
    style: Scorer[Embed]
    style_threshold: float
    human: Scorer[TextScorer]
    facts: Scorer[Verifier]
    judge: Judge | None = None

    def names(self) -> dict[str, list[str | None]]:
        """Part to name of the scorer and of its twin, for the card."""
        parts: Mapping[str, Scorer[Any]] = {"embed": self.embed, "style": self.style, "human": self.human, "facts": self.facts}
        return {part: [scorer.name, scorer.twin_name] for part, scorer in parts.items()}


def load(embedder: str = "auto", judge: Judge | None = None) -> Scorers:
    """The packaged scorers.

    Raises:
        MissingAssetError: MiniLM has not been fetched.
        MissingExtraError: torch, transformers or safetensors is not installed.
    """
    from usp_env.models import embedders
    from usp_env.models import scorers as shipped

    meaning, style = embedders.load(embedder), shipped.load("style-v1")
    return Scorers(
        embed=Scorer(Remembered(meaning), meaning.name),
        style=Scorer(style, "style-v1"),
        style_threshold=style.threshold,
        human=Scorer(shipped.load("human-v1"), "human-v1", shipped.load("human-v1-twin"), "human-v1-twin"),
        facts=Scorer(shipped.load("facts-v1"), "facts-v1", shipped.load("facts-v1-twin"), "facts-v1-twin"),
        judge=judge,
    )
