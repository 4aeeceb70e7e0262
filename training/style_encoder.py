"""Train the style encoder: turns of one author lie close, turns of others on the same topic do not.

    python -m training.style_encoder          # about 3 minutes on 2 idle cores; needs `usp-env fetch minilm sharegpt`

Writes `usp_env/models/style-v1.safetensors` and `docs/models/style_encoder.md`. Authors are conversations. Content is controlled
for as Wegmann et al. (2022) do: the positive of a turn is its author's topically most distant turn, the negative the topically
nearest turn of anybody else (MiniLM decides what topic is), so that content can only mislead. The encoder is a linear
discriminant on habits of the hand and function words: n-grams of characters carry content, and under the control content hurts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.auxiliary import Array, Clock, Person, auc, bootstrap, people, quick_vectors, save, shown, write_card, youden
from usp_env.models import features
from usp_env.models.scorers import StyleEncoder, read_weights, style_dense

NAME = "style-v1"
SEED = 0
BUCKETS = 2**14  # of the rival that has character n-grams
DIM = 32
SHRINK = 0.3  # of the scatter within authors, towards a multiple of the identity
MIN_CHARS = 20  # "continue" has no style of its own
MAX_TURNS = 6  # of one author in training
POOL = 300  # conversations of nobody in the bank that lend topical negatives to val and test, and are not trained on


class Turns(NamedTuple):
    """Turns of many authors: texts (n,), author of each (n,), topic vectors (n, 384)."""

    texts: list[str]
    author: Array
    topic: Array


class Trials(NamedTuple):
    """Pairs of turns by index, (m, 2); whether one author wrote both, (m,); the anchor's author, the cluster, (m,)."""

    pairs: Array
    same: Array
    cluster: Array


def chosen_turns(chosen: Sequence[Person], at_most: int, rng: np.random.Generator) -> tuple[list[str], npt.NDArray[np.str_]]:
    """Distinct turns long enough to have a style, of authors that have two of them; and their authors."""
    texts: list[str] = []
    author: list[str] = []
    for person in chosen:
        own = [text for text in dict.fromkeys(person.turns) if len(text) >= MIN_CHARS]
        own = [own[i] for i in sorted(rng.choice(len(own), min(at_most, len(own)), replace=False))] if own else own
        if len(own) >= 2:
            texts += own
            author += [person.id] * len(own)
    return texts, np.array(author)


def turns_of(chosen: Sequence[Person], at_most: int, cache: Path | None, rng: np.random.Generator) -> Turns:
    """`chosen_turns`, with their topics."""
    texts, authors = chosen_turns(chosen, at_most, rng)
    return Turns(texts, authors, quick_vectors(texts, cache))


def trials(turns: Turns, anchors: set[str], controlled: bool, rng: np.random.Generator) -> Trials:
    """Each turn of an anchor author with one of the same author's and one of another's.

    Controlled: the topically most distant of the author's, the topically nearest of all others'; else drawn at random.
    """
    rows: list[tuple[int, int]] = []
    for i, author in enumerate(turns.author):
        if author not in anchors:
            continue
        likeness = turns.topic @ turns.topic[i]
        own = np.flatnonzero((turns.author == author) & (np.arange(len(turns.texts)) != i))
        others = np.flatnonzero(turns.author != author)
        pick = (
            (own[likeness[own].argmin()], others[likeness[others].argmax()])
            if controlled
            else (rng.choice(own), rng.choice(others))
        )
        rows += [(i, int(pick[0])), (i, int(pick[1]))]
    pairs = np.array(rows)
    return Trials(pairs, np.tile([True, False], len(rows) // 2), turns.author[pairs[:, 0]])


def scores(vectors: Array, pairs: Array) -> Array:
    """Cosine of the pairs' vectors, (m,)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    product: Array = np.einsum("md,md->m", unit[pairs[:, 0]], unit[pairs[:, 1]])
    return product


def partners(turns: Turns, rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """For each turn the author's topically most distant and a random other turn, a stranger's nearest and a random one, (n,)."""
    _, place = np.unique(turns.author, return_inverse=True)
    rows = []
    for start in range(0, len(place), 1000):  # blocks, since all similarities at once take gigabytes
        i = np.arange(start, min(start + 1000, len(place)))
        likeness = turns.topic[i] @ turns.topic.T
        own, chance = place[i][:, None] == place, rng.random(likeness.shape, np.float32)
        other = own & (np.arange(len(place)) != i[:, None])
        rows.append(
            [
                np.where(other, -likeness, -9).argmax(1),
                np.where(other, chance, -9).argmax(1),
                np.where(own, -9, likeness).argmax(1),
                np.where(own, -9, chance).argmax(1),
            ]
        )
    far, mine, near, any_ = np.concatenate(rows, axis=1)
    return far, mine, near, any_


def discriminant(within: Array, between: Array, shrink: float, dim: int) -> Array:
    """Directions in which strangers differ more than one author does, (f, at most dim), best first.

    Solves between u = λ (within + shrink · mean variance · I) u and scales each u by √(λ − 1): what differs as much within an
    author as between strangers (λ ≤ 1) counts nothing. Fisher's criterion with the strangers near in topic, so that topic is
    no way to tell authors apart.
    """
    from scipy.linalg import eigh

    ridge = shrink * np.trace(within) / len(within) * np.eye(len(within))
    ratio, directions = eigh(between, within + ridge)
    best = np.argsort(-ratio)[:dim]
    best = best[ratio[best] > 1]
    found: Array = directions[:, best] * np.sqrt(ratio[best] - 1)
    return found


def fit(turns: Turns, seed: int) -> dict[str, Array]:
    """The projection and what standardises its input; as many pairs under topic control as at random."""
    raw = style_dense(turns.texts)
    mean, scale = raw.mean(0), raw.std(0) + 1e-3
    x = StyleEncoder.standardise(raw, mean, scale)
    far, mine, near, anyone = partners(turns, np.random.default_rng(seed))
    within, between = (scatter(x, far) + scatter(x, mine), scatter(x, near) + scatter(x, anyone))
    return {"projection": discriminant(within, between, SHRINK, DIM), "mean": mean, "scale": scale}


def scatter(x: Array, partner: Array) -> Array:
    """Mean outer product of the rows' differences from their partners' rows: (n, f) and (n,) to (f, f)."""
    difference = x - x[partner]
    product: Array = difference.T @ difference / len(x)
    return product


def baselines(fitted_on: Turns, turns: Turns) -> dict[str, Array]:
    """Vectors of the rivals: MiniLM, TF-IDF of character n-grams, function words and habits of the hand (standardised)."""
    hashed = [features.hashed_chars(t.texts, BUCKETS) for t in (fitted_on, turns)]
    counts = np.bincount(hashed[0].indices, minlength=BUCKETS)
    idf = np.log(len(fitted_on.texts) / np.maximum(counts, 1))
    chars = np.zeros((len(turns.texts), BUCKETS), np.float32)
    chars[np.repeat(np.arange(len(turns.texts)), np.diff(hashed[1].indptr)), hashed[1].indices] = (
        hashed[1].values * idf[hashed[1].indices]
    )
    known, own = (features.surface(t.texts) for t in (fitted_on, turns))
    hand = np.clip((own - known.mean(0)) / (known.std(0) + 1e-3), -5, 5)
    words = own[:, len(features.SURFACE) :]
    known, own = (style_dense(t.texts) for t in (fitted_on, turns))
    every = StyleEncoder.standardise(own, known.mean(0), known.std(0) + 1e-3)
    return {
        "MiniLM": turns.topic,
        "character n-grams (TF-IDF)": chars,
        "function words": words,
        "habits and function words": hand,
        "character n-grams + function words": np.hstack([_unit(chars), _unit(hand)]),
        "features of style-v1, untrained": every,
    }


def _unit(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def compare(vectors: dict[str, Array], tests: dict[str, Trials]) -> dict[str, Any]:
    """AUC of every encoder on every set of trials, and its distance from ours with the interval of the difference."""
    figures: dict[str, Any] = {}
    for kind, t in tests.items():
        s = {name: scores(v, t.pairs) for name, v in vectors.items()}
        clusters = list(t.cluster)
        figures[kind] = {"pairs": len(t.same), "authors": len(set(clusters))}
        for name, value in s.items():
            figures[kind][name] = bootstrap(clusters, lambda i: auc(value[i], t.same[i]))  # noqa: B023 - called at once
            if name != NAME:
                ours = s[NAME]
                figures[kind][f"{NAME} minus {name}"] = bootstrap(
                    clusters,
                    lambda i: auc(ours[i], t.same[i]) - auc(value[i], t.same[i]),  # noqa: B023
                )
    return figures


def held_out(chosen: Sequence[Person], pool: Sequence[Person], cache: Path | None) -> tuple[Turns, dict[str, Trials]]:
    """Turns of a split and of the pool, and the trials on them."""
    rng = np.random.default_rng(SEED + 1)
    turns = turns_of([*chosen, *pool], 99, cache, rng)
    anchors = {person.id for person in chosen}
    return turns, {"topic controlled": trials(turns, anchors, True, rng), "random": trials(turns, anchors, False, rng)}


def main() -> None:
    """Train, set the threshold, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder that keeps topic vectors between runs")
    parser.add_argument("--tune", action="store_true", help="measure on val and write nothing")
    args = parser.parse_args()
    clock, found = Clock(), people(SEED)
    pool, others = found["other"][:POOL], found["other"][POOL:]
    training = turns_of([*found["train"], *others], MAX_TURNS, args.cache, np.random.default_rng(SEED))
    val, val_tests = held_out(found["val"], pool, args.cache)
    print(f"{len(training.texts)} turns after {clock()} s", flush=True)
    tensors = fit(training, SEED)
    print(f"fitted after {clock()} s", flush=True)
    ours = StyleEncoder(NAME, tensors, {"threshold": 0.0})
    vectors = ours(val.texts)
    threshold = youden(
        np.concatenate([scores(vectors, t.pairs) for t in val_tests.values()]),
        np.concatenate([t.same for t in val_tests.values()]),
    )
    figures = compare({NAME: vectors, **baselines(training, val)}, val_tests)
    if args.tune:
        print(json.dumps(figures, indent=1), threshold, _accuracy(ours, val, val_tests, threshold))
        return
    on_val = {kind: figures[kind][NAME] for kind in val_tests}
    save(NAME, tensors, {"threshold": threshold, "seed": SEED, "authors": len(set(training.author))})
    model = StyleEncoder(NAME, *read_weights(NAME))
    test, test_tests = held_out(found["test"], pool, args.cache)
    figures = compare({NAME: model(test.texts), **baselines(training, test)}, test_tests)
    figures["AVA threshold"] = round(threshold, 4)
    figures["AVA accuracy"] = _accuracy(model, test, test_tests, threshold)
    figures["val"] = on_val
    figures["trained on"] = {"authors": len(set(training.author)), "turns": len(training.texts)}
    figures |= {"dim": model.dim, "features": len(tensors["mean"])}
    figures["wall seconds"] = clock()
    print(json.dumps(figures, indent=1))
    write_card("style_encoder", card(figures), figures)


def _accuracy(
    model: Callable[[Sequence[str]], Array], turns: Turns, tests: dict[str, Trials], threshold: float
) -> dict[str, Any]:
    found = {}
    for kind, t in tests.items():
        right = (scores(model(turns.texts), t.pairs) >= threshold) == t.same
        found[kind] = bootstrap(list(t.cluster), lambda i: float(right[i].mean()))  # noqa: B023 - called at once
    return found


def card(figures: dict[str, Any]) -> str:
    """The card's prose."""
    hard, easy = figures["topic controlled"], figures["random"]
    rows = [
        f"| {name} | {shown(hard[name])} | {_behind(hard, name)} | {shown(easy[name])} | {_behind(easy, name)} |"
        for name in hard
        if f"{NAME} minus {name}" in hard or name == NAME
    ]
    accuracy = figures["AVA accuracy"]
    val = figures["val"]
    return f"""
# style encoder: `style-v1`

How a text is written, as a unit vector of {figures["dim"]}: `usp_env.models.scorers.load("style-v1")(texts)`; the dot product is the similarity.

| | |
|---|---|
| model | linear discriminant of {figures["features"]} standardised features (habits of the hand, function words, length), scaled to norm 1; no n-grams, no network |
| data | user turns of at least {MIN_CHARS} characters of real ShareGPT conversations; an author is a conversation. Trained on {figures["trained on"]["authors"]} authors, {figures["trained on"]["turns"]} turns (`train` and conversations without a profile); threshold on `val`; figures on `test`; {POOL} conversations that are in none of them lend negatives to both; reserved conversations in none |
| content control | after Wegmann et al. (2022): positive = the same author's topically most distant turn, negative = the topically nearest turn of all other authors (MiniLM) |
| fit | closed form: directions u with between u = λ (within + {SHRINK} · mean variance · I) u and λ > 1, scaled by √(λ − 1), at most {DIM}; *within* and *between* are the mean squared differences of same-author and of strangers' pairs, half of them under the control, half random |
| command | `python -m training.style_encoder`, seed {SEED}, {figures["wall seconds"]:.0f} s on 2 shared cores |

AUC of same-author pairs of `test`, 95 % intervals by bootstrap over authors ({hard["authors"]} authors, {hard["pairs"]} pairs).
On `val`, where shrinkage and dimension were chosen: {shown(val["topic controlled"])} topic controlled, {shown(val["random"])} random.

| encoder | topic controlled | style-v1 minus it | random pairs | style-v1 minus it |
|---|---|---|---|---|
{chr(10).join(rows)}

AVA: two texts count as one author's from a cosine of {figures["AVA threshold"]}, Youden's on `val` over controlled and random pairs together:
AVA meets pairs of either kind, and both have as many positives as negatives. That is right for {shown(accuracy["topic controlled"])}
of controlled and {shown(accuracy["random"])} of random pairs of `test`.

## Limits

- Under the control MiniLM lies below .5 by construction: negatives are chosen by it. So does whatever carries content.
- On random pairs MiniLM is ahead: an author's turns share a topic, which this encoder is made to ignore.
- Hashed character n-grams trained by InfoNCE carried content and fell behind the untrained habits under the control; n-grams of
  distorted text (Stamatatos, 2017) added nothing to these features on `val`. Both are left out.
- One conversation is one author here, so that the occasion (a task, a pasted format, a mood) passes for the hand.
- Single turns are short; the similarity of two of them is noisy, means over a conversation are not.
- English.
"""  # noqa: E501 - a table row is a line


def _behind(figures: dict[str, Any], name: str) -> str:
    return "" if name == NAME else shown(figures[f"{NAME} minus {name}"])


if __name__ == "__main__":
    main()
