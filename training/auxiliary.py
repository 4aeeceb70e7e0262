"""What the programs for the auxiliary models share: conversations and their splits, metrics, bootstrap, files.

Metrics are plain functions of scores and labels; every interval is a bootstrap over conversations, since turns of one
conversation resemble each other.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import usp_env.models
from training.conversations import held_out_turns, shares
from usp_env.data import conversations
from usp_env.dialogue import Dialogue
from usp_env.models import embedders, pairs
from usp_env.profiles import Profile, ProfileBank, reserved_ids

Array = npt.NDArray[Any]
MODELS = Path(usp_env.models.__file__).parent
CARDS = Path(__file__).resolve().parent.parent / "docs" / "models"
RESAMPLES = 500

_ENGLISH = re.compile(
    r"\b(?:the|a|an|to|of|and|in|is|for|i|you|me|it|that|what|how|please|write|with|on|this|my)\b", re.IGNORECASE
)
_PRIVATE = re.compile(r"[\w.+-]+@[\w-]+\.\w|\+?\d[\d -]{9,}\d")
_UNFIT = re.compile(
    r"\b(?:sex\w*|porn\w*|nud(?:e|ity)|erotic\w*|rape\w*|fetish\w*|suicid\w*|self-harm|nazi\w*|nigg\w*|fuck\w*)\b", re.I
)


@dataclass(frozen=True)
class Person:
    """A real conversation, and the profile of who had it where one was written."""

    id: str
    dialogue: Dialogue
    profile: Profile | None = None

    @property
    def turns(self) -> list[str]:
        """The user's utterances."""
        return self.dialogue.utterances("user")

    @property
    def replies(self) -> list[str]:
        """The assistant's utterances."""
        return self.dialogue.utterances("assistant")


def people(seed: int = 0) -> dict[str, list[Person]]:
    """`train`, `val` and `test` of the bank, and `other`: usable conversations without a profile, in an order of their own.

    Reserved conversations are in none of them, and who shares one of `held_out_turns` is not in `train` and `other`.
    """
    bank = {profile.id: profile for profile in ProfileBank.load("sharegpt")}
    kept = held_out_turns("sharegpt")
    found: dict[str, list[Person]] = {"train": [], "val": [], "test": [], "other": []}
    for key, dialogue in sorted(_usable().items()):
        profile = bank.get(key)
        split = profile.split or "other" if profile else "other"
        if split in ("val", "test") or not shares(dialogue, kept):
            found[split].append(Person(key, dialogue, profile))
    np.random.default_rng(seed).shuffle(found["other"])  # type: ignore[arg-type]
    return found


def auc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve: P(a positive exceeds a negative), ties counted half (Mann and Whitney)."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n, m = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def macro_f1(predicted: Array, labels: Array) -> float:
    """Mean of the F1 of both classes."""
    predicted, labels = np.asarray(predicted, bool), np.asarray(labels, bool)
    each = []
    for p, t in ((predicted, labels), (~predicted, ~labels)):
        each.append(2 * np.sum(p & t) / max(p.sum() + t.sum(), 1))
    return float(np.mean(each))


def youden(scores: Array, labels: Array) -> float:
    """The threshold t that maximises TPR − FPR of `score >= t`; midway between the two scores it falls between."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], labels[order]
    gain = np.cumsum(hits) / hits.sum() - np.cumsum(~hits) / (~hits).sum()
    last = np.append(ranked[:-1] != ranked[1:], True)  # a threshold lies only between different scores
    best = int(np.flatnonzero(last)[np.argmax(gain[last])])
    return float((ranked[best] + ranked[best + 1]) / 2) if best + 1 < len(ranked) else float(ranked[best])


def platt(scores: Array, labels: Array, weight: Array | None = None) -> tuple[float, float]:
    """(a, b) of p = σ(a·score + b) by weighted maximum likelihood (Platt, 1999), Newton's method."""
    x, y = np.asarray(scores, float), np.asarray(labels, float)
    v = np.ones_like(x) if weight is None else np.asarray(weight, float)
    design, w = np.stack([x, np.ones_like(x)], 1), np.array([1.0, 0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(design @ w, -30, 30)))
        gradient = design.T @ (v * (p - y)) + 1e-3 * (w - [1.0, 0.0])
        hessian = (design * (v * p * (1 - p))[:, None]).T @ design + 1e-3 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        w = w - step / max(1.0, float(np.abs(step).max()))
    return float(w[0]), float(w[1])


def bootstrap(clusters: Sequence[str], statistic: Callable[[Array], float], seed: int = 0, n: int = RESAMPLES) -> list[float]:
    """[estimate, low, high]: a statistic of row indices with its 95 % interval, conversations drawn with replacement."""
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    rows = [np.flatnonzero(place == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    draws = [statistic(np.concatenate([rows[k] for k in rng.integers(len(names), size=len(names))])) for _ in range(n)]
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return [round(float(v), 4) for v in (statistic(np.arange(len(place))), low, high)]


def save(name: str, tensors: dict[str, Array], meta: dict[str, Any]) -> Path:
    """Write `usp_env/models/NAME.safetensors`: matrices in float16, vectors in float32, `meta` as JSON in its header."""
    from safetensors.numpy import save_file

    small = {k: np.ascontiguousarray(v, np.float16 if np.asarray(v).size > 4096 else np.float32) for k, v in tensors.items()}
    path = MODELS / f"{name}.safetensors"
    save_file(small, path, metadata={"usp_env": json.dumps({"name": name, **meta}, sort_keys=True)})
    path.chmod(0o644)  # safetensors makes it private
    return path


def write_card(name: str, text: str, figures: dict[str, Any]) -> Path:
    """Write `docs/models/NAME.md`: the text, then all figures as JSON."""
    CARDS.mkdir(parents=True, exist_ok=True)
    path = CARDS / f"{name}.md"
    path.write_text(f"{text.strip()}\n\n## All figures\n\n```json\n{json.dumps(figures, indent=1)}\n```\n", "utf-8")
    return path


def keep(file: Path, write: Callable[[Any], object]) -> None:
    """Write a file of a cache whole or not at all: what a kill cut off would stop every later run.

    Args:
        file: Where; missing folders are made.
        write: Told the stream to write to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.new")
    with fresh.open("wb") as stream:
        write(stream)
    fresh.replace(file)


def quick_vectors(texts: Sequence[str], cache: Path | None = None) -> Array:
    """MiniLM vectors of the texts' first 64 word pieces in bfloat16 (cosine with the exact ones .9999), (n, 384).

    Args:
        texts: Any number.
        cache: Folder that keeps them between runs; None keeps nothing.
    """
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    file = cache / f"vectors-{digest}.npy" if cache else None
    if file and file.is_file():
        return np.load(file)
    exact = embedders.load("minilm")
    assert isinstance(exact, embedders.TransformerEmbedder)
    vectors = embedders.TransformerEmbedder(copy.deepcopy(exact._model).bfloat16(), exact._tokenizer, "minilm-quick", 64)(texts)
    if file:
        keep(file, lambda stream: np.save(stream, vectors))
    return vectors


def quick_reader(cache_size: int = 100_000) -> pairs.StateReader:
    """Token states in bfloat16, twice as fast as the exact ones that the shipped models read; for training and tuning."""
    exact = embedders.load("minilm")
    assert isinstance(exact, embedders.TransformerEmbedder)
    quick = embedders.TransformerEmbedder(copy.deepcopy(exact._model).bfloat16(), exact._tokenizer, "minilm-quick", 256)
    return pairs.StateReader(quick, cache_size)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        """Seconds, to a tenth."""
        return round(time.perf_counter() - self.start, 1)


def shown(figure: Sequence[float], digits: int = 3) -> str:
    """`.953 [.946, .960]`."""
    value, low, high = (f"{v:.{digits}f}" for v in figure)
    return f"{value} [{low}, {high}]"


def usable(dialogue: Dialogue) -> bool:
    """Whether a conversation is fit to learn from: the rules by which the bank's were chosen.

    It starts with the user, strictly alternates, has at least three user turns of at most 2,000 characters, is English, and
    holds no address or telephone number and no sexual, hateful or self-harm terms on the user's side.
    """
    roles = [message.role for message in dialogue]
    turns = dialogue.utterances("user")
    text = " ".join(turns)
    return (
        roles == [("user", "assistant")[k % 2] for k in range(len(roles))]
        and len(turns) >= 3
        and max(map(len, turns)) <= 2000
        and sum(ord(char) < 128 for char in text) >= 0.97 * len(text)
        and len(_ENGLISH.findall(text)) >= 0.08 * len(text.split())
        and not _PRIVATE.search(text)
        and not _UNFIT.search(text)
    )


def _usable() -> dict[str, Dialogue]:
    bank = {profile.id for profile in ProfileBank.load("sharegpt")}
    found: dict[str, Dialogue] = {}
    openings: set[str] = set()
    for conversation in conversations.load("sharegpt"):
        key, dialogue = conversation.id, conversation.dialogue
        if key in found or key in reserved_ids() or not (key in bank or (key.endswith("_0") and usable(dialogue))):
            continue
        opening = dialogue.messages[0].content[:200]
        if key in bank or opening not in openings:
            found[key] = dialogue
            openings.add(opening)
    return found
