"""How much a simulated user is like the real one: Sem-Sim, Style-Sim, AVA, human-likeness, ADV.

    at an utterance    the generated turn against the real turn of the same context
    at a conversation  `joined(generated)` against `joined(real)`: all user turns of each

One value per pair or dialogue, so that intervals can be computed over people. Cosines and shares are in their natural units, not
in hundreds. NaN is no judgement, not a zero: nothing was said on one side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError, require
from usp_env.rewards.human_likeness import TextScorer, probabilities

FloatArray = npt.NDArray[np.float64]
Embed = Callable[[Sequence[str]], npt.NDArray[Any]]
AdvProtocol = Literal["ours", "paper"]

PERCENTILES = tuple(range(0, 101, 5))
"""Where the paper's script draws the ADV curve."""
MARK = 60
"""The percentile that the paper marks on it."""


def joined(dialogues: Sequence[Dialogue], protocol: AdvProtocol = "ours") -> list[str]:
    """One text per dialogue: its user turns with spaces between, or with `protocol="paper"` all turns of both sides.

    The authors' ADV script joins every turn that is no system message, the assistant's too.

    Raises:
        SpecError: No such protocol.

    Example:
        >>> said = [("user", "soup?"), ("assistant", "Leek."), ("user", "ok")]
        >>> talk = Dialogue.of({"role": role, "content": text} for role, text in said)
        >>> joined([talk]), joined([talk], "paper")
        (['soup? ok'], ['soup? Leek. ok'])
    """
    if protocol not in ("ours", "paper"):
        raise SpecError(f"expected protocol 'ours' or 'paper', got {protocol!r}")
    if protocol == "paper":
        return [" ".join(message.content for message in dialogue) for dialogue in dialogues]
    return [" ".join(dialogue.utterances("user")) for dialogue in dialogues]


def sem_sim(generated: Sequence[str], real: Sequence[str], embed: Embed) -> FloatArray:
    """Sem-Sim (paper §5.3): cosine of the sentence embeddings of what was generated and what the person said. Higher is better.

    Args:
        generated: Utterances, or `joined` dialogues; n.
        real: Their counterparts, n.
        embed: Texts to vectors, (n, d); the paper's is SimCSE (`usp_env.models.embedders.load`).

    Returns:
        (n,), in [-1, 1]; NaN where a text is blank or its vector is 0.

    Raises:
        SpecError: Not as many generated as real texts, or vectors of another shape.

    Example:
        >>> axes = {"soup": [1.0, 0.0], "stew": [0.6, 0.8]}
        >>> sem_sim(["stew", "soup", ""], ["soup", "soup", "soup"], lambda texts: np.array([axes[text] for text in texts]))
        array([0.6, 1. , nan])
    """
    _same_length(len(generated), len(real), "generated and real texts")
    spoken = np.array([bool(a.strip() and b.strip()) for a, b in zip(generated, real, strict=True)], bool)
    out = np.full(len(spoken), np.nan)
    pairs = [(generated[i], real[i]) for i in np.flatnonzero(spoken)]
    if pairs:
        # Each text once: equal texts then have one vector, whatever batch they would have shared.
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        row = {text: i for i, text in enumerate(texts)}
        vectors = _unit(_vectors(embed(texts), len(texts)))
        left, right = (vectors[[row[pair[side]] for pair in pairs]] for side in (0, 1))
        out[spoken] = np.clip((left * right).sum(axis=1), -1, 1)
    return out


def style_sim(generated: Sequence[str], real: Sequence[str], style: Embed) -> FloatArray:
    """Style-Sim (paper §5.3): as `sem_sim`, in the space of a style encoder (the paper's: Wegmann et al. 2022).

    Args:
        generated: Utterances, or `joined` dialogues; n.
        real: Their counterparts, n.
        style: Texts to style vectors, (n, d); `usp_env.models.scorers.load("style-v1")`.

    Returns:
        (n,), in [-1, 1]; NaN where a text is blank or its vector is 0. Higher is better.

    Raises:
        SpecError: Not as many generated as real texts, or vectors of another shape.

    Example:
        >>> def case(texts):
        ...     return np.array([[1.0, 0.0] if text.islower() else [0.0, 1.0] for text in texts])
        >>> style_sim(["pls help", "Please help."], ["thx", "thx"], case)
        array([1., 0.])
    """
    return sem_sim(generated, real, style)


def ava(style_similarity: npt.NDArray[Any], threshold: float) -> FloatArray:
    """AVA (paper §5.3): whether each pair counts as one author's, style similarity >= threshold; the mean is the metric.

    The paper gives no threshold; it belongs to the encoder (`style.threshold`: Youden's on `val`), so compare AVA within one
    encoder only, and show `ava_sensitivity` beside it.

    Args:
        style_similarity: What `style_sim` returned, (n,).
        threshold: Cosine.

    Returns:
        (n,), 0 or 1; NaN where the similarity is. Higher is better.

    Example:
        >>> ava(np.array([0.7, 0.6, 0.2, np.nan]), 0.6)
        array([ 1.,  1.,  0., nan])
    """
    similarity = np.asarray(style_similarity, np.float64)
    return np.where(np.isnan(similarity), np.nan, similarity >= threshold).astype(np.float64)


def ava_sensitivity(style_similarity: npt.NDArray[Any], thresholds: Sequence[float]) -> FloatArray:
    """AVA over several thresholds: does the order of two users hang on the choice?

    Args:
        style_similarity: What `style_sim` returned, (n,); NaN are left out.
        thresholds: Cosines, t.

    Returns:
        Shares in [0, 1], (t,), falling as thresholds rise; NaN where no pair has a value.

    Example:
        >>> ava_sensitivity(np.array([0.7, 0.6, 0.2, np.nan, 0.9]), [0.5, 0.65, 0.95])
        array([0.75, 0.5 , 0.  ])
    """
    similarity = np.asarray(style_similarity, np.float64)
    similarity = similarity[~np.isnan(similarity)]
    if not len(similarity):
        return np.full(len(thresholds), np.nan)
    return np.array([(similarity >= threshold).mean() for threshold in thresholds], np.float64)


def human_likeness(turns: Sequence[Sequence[str]], scorer: TextScorer) -> FloatArray:
    """Human-likeness: mean over the user turns of P(a person wrote this), each turn judged by itself (paper §4.3).

    Args:
        turns: User turns per dialogue, n lists.
        scorer: Texts to P(human), (n,) (`usp_env.models.scorers.load("human-v1")`); called once for all dialogues.

    Returns:
        (n,), in [0, 1]; NaN where the user has no turn. Higher is better.

    Raises:
        BackendError: A remote scorer failed after its retries.
        SpecError: The scorer gave another shape, or a value outside of [0, 1].

    Example:
        >>> human_likeness([["pls help", "Certainly!"], []], lambda texts: np.array([float(t.islower()) for t in texts]))
        array([0.5, nan])
    """
    texts = [text for own in turns for text in own]
    values = probabilities(scorer(texts), len(texts), "human_likeness") if texts else np.zeros(0)
    return means_by_dialogue(values, [len(own) for own in turns])


def means_by_dialogue(values: npt.NDArray[Any], lengths: Sequence[int]) -> FloatArray:
    """A flat vector over all utterances as one mean per dialogue; NaN values are left out.

    Args:
        values: (m,), dialogue after dialogue.
        lengths: Utterances of each of n dialogues; sum m.

    Returns:
        (n,); NaN where a dialogue has no value.

    Raises:
        SpecError: The lengths do not sum to m.

    Example:
        >>> means_by_dialogue(np.array([0.2, 0.4, np.nan, 0.6]), [2, 2, 0])
        array([0.3, 0.6, nan])
    """
    flat = np.asarray(values, np.float64)
    _same_length(len(flat), int(sum(lengths)), "values and utterances")
    owner = np.repeat(np.arange(len(lengths)), lengths)
    defined = ~np.isnan(flat)
    sums = np.bincount(owner[defined], flat[defined], len(lengths))
    counts = np.bincount(owner[defined], minlength=len(lengths))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def adv(
    real: Sequence[Dialogue],
    generated: Mapping[str, Sequence[Dialogue]],
    embed: Embed,
    *,
    protocol: AdvProtocol = "ours",
    reference: Sequence[Dialogue] | None = None,
) -> dict[str, FloatArray]:
    """ADV (paper Figure 3): distance between a generated dialogue and the real one on the plane of two principal components.

    Embeddings are standardised per dimension and reduced to 2 components; the Euclidean distance of each pair is in units of that
    plane, so it compares users on one plane only. `protocol`:

    - `"ours"`: user turns alone, plane fitted on real dialogues: a user's value does not depend on whom it is shown beside.
    - `"paper"`: as in the authors' script, all turns of both sides, plane fitted on the real and all users' dialogues together.

    Args:
        real: Target dialogues, n.
        generated: User to its dialogues, each n, in the order of `real`.
        embed: Texts to vectors, (n, d).
        protocol: See above.
        reference: Real dialogues that the plane is fitted on instead of `real` (all of the split); `"ours"` only.

    Returns:
        User to distances (n,), >= 0; lower is better. NaN where a side of the pair said nothing.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        SpecError: Numbers of dialogues differ, or fewer than 3 embeddings that span 2 dimensions.

    Example:
        >>> corners = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
        >>> def embed(texts):
        ...     return np.array([corners[int(text)] for text in texts])
        >>> talks = [Dialogue.of([{"role": "user", "content": str(i)}]) for i in range(4)]
        >>> swapped = {"same": talks, "mirrored": [talks[i] for i in (1, 0, 3, 2)]}
        >>> {user: distances.round(6).tolist() for user, distances in adv(talks, swapped, embed).items()}
        {'same': [0.0, 0.0, 0.0, 0.0], 'mirrored': [2.0, 2.0, 2.0, 2.0]}
    """
    for user, dialogues in generated.items():
        _same_length(len(dialogues), len(real), f"dialogues of {user!r} and real ones")
    if protocol == "paper" and reference is not None:
        raise SpecError("expected no reference with protocol='paper': its plane is fitted on what it compares")
    sets = [joined(dialogues, protocol) for dialogues in (real, *generated.values(), reference or ())]
    texts = [text for text in dict.fromkeys(text for own in sets for text in own) if text.strip()]
    vectors = _vectors(embed(texts), len(texts)) if texts else np.zeros((0, 1))
    row = {text: i for i, text in enumerate(texts)}
    fitted_on = sets[:-1] if protocol == "paper" else [sets[0] if reference is None else sets[-1]]
    plane = _plane(vectors, [row[text] for own in fitted_on for text in own if text in row])
    out = {}
    for user, own in zip(generated, sets[1:-1], strict=True):
        pairs = [(row.get(a, -1), row.get(b, -1)) for a, b in zip(own, sets[0], strict=True)]
        left, right = np.array(pairs, np.int64).reshape(-1, 2).T
        distances = np.linalg.norm(plane[left] - plane[right], axis=1)
        out[user] = np.where((left < 0) | (right < 0), np.nan, distances)
    return out


def _plane(vectors: FloatArray, fitted_on: Sequence[int]) -> FloatArray:
    """Coordinates (n, 2) of all vectors on the plane of the principal components of some of them."""
    decomposition, preprocessing = require("sklearn.decomposition", "sampling"), require("sklearn.preprocessing", "sampling")
    own = vectors[list(fitted_on)]
    if len(own) < 3 or vectors.shape[1] < 2:
        raise SpecError(f"ADV: expected at least 3 dialogues with words, and vectors of 2 or more entries, got {own.shape}")
    scaler = preprocessing.StandardScaler().fit(own)
    pca = decomposition.PCA(n_components=2, svd_solver="full")
    scaled = scaler.transform(own)
    if np.linalg.matrix_rank(scaled - scaled.mean(axis=0)) < 2:
        raise SpecError(f"ADV: expected embeddings that span a plane, got {len(own)} that are all alike or lie on one line")
    pca.fit(scaled)
    coordinates: FloatArray = pca.transform(scaler.transform(vectors))
    return coordinates


def percentile_curve(distances: npt.NDArray[Any], percentiles: Sequence[float] = PERCENTILES) -> FloatArray:
    """The paper's ADV curve: the distances at the percentiles 0, 5, … 100 (linear between values).

    Args:
        distances: (n,); NaN are left out.
        percentiles: p of them, in [0, 100].

    Returns:
        (p,), rising; NaN where no distance is defined.

    Example:
        >>> percentile_curve(np.array([3.0, 1.0, 2.0, np.nan]), [0, 50, 75, 100])
        array([1. , 2. , 2.5, 3. ])
        >>> len(percentile_curve(np.zeros(4)))
        21
    """
    defined = np.asarray(distances, np.float64)
    defined = defined[~np.isnan(defined)]
    if not len(defined):
        return np.full(len(percentiles), np.nan)
    return np.asarray(np.percentile(defined, percentiles), np.float64)


def at_mark(distances: npt.NDArray[Any], percentile: float = MARK) -> float:
    """The distance that `percentile` % of the dialogues do not exceed; the paper marks 60.

    Example:
        >>> at_mark(np.arange(11.0))
        6.0
    """
    return float(percentile_curve(distances, [percentile])[0])


def _same_length(a: int, b: int, what: str) -> None:
    if a != b:
        raise SpecError(f"expected as many {what}, got {a} and {b}")


def _vectors(vectors: Any, n: int) -> FloatArray:
    array: FloatArray = np.asarray(vectors, np.float64)
    if array.ndim != 2 or len(array) != n or not np.isfinite(array).all():
        raise SpecError(f"expected an embedder that gives {n} finite vectors, ({n}, d), got {array.shape}")
    return array


def _unit(vectors: FloatArray) -> FloatArray:
    """Rows of norm 1; NaN for a row of zeros, which has no direction."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: FloatArray = vectors / np.where(norms > 0, norms, np.nan)
    return unit
