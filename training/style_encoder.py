"""Train the style encoder: turns of one author lie close, turns of others on the same topic do not.

    python -m training.style_encoder          # about 5 minutes on 2 idle cores; needs `usp-env fetch minilm sharegpt`

Writes `usp_env/models/style-v1.safetensors` and `docs/models/style_encoder.md`. Authors are conversations. Content is controlled
for as Wegmann et al. (2022) do: the positive of a turn is its author's topically most distant turn, negatives come from the
conversations nearest in topic (MiniLM decides what topic is), so that content can only mislead. The encoder is linear in hashed
character n-grams and habits of the hand, trained by InfoNCE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.auxiliary import Array, Clock, Person, auc, bootstrap, people, quick_vectors, save, shown, write_card, youden
from usp_env.models import features
from usp_env.models.scorers import StyleEncoder, read_weights, style_dense

NAME = "style-v1"
SEED = 0
BUCKETS = 2**14
DIM = 64
MIN_CHARS = 20  # "continue" has no style of its own
MAX_TURNS = 6  # of one author in training
POOL = 300  # conversations of nobody in the bank that lend topical negatives to val and test, and are not trained on
GROUPS, GROUP = 8, 24  # a batch: so many neighbourhoods of so many authors
EPOCHS = 24
TEMPERATURE = 0.1


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


def turns_of(chosen: Sequence[Person], at_most: int, cache: Path | None, rng: np.random.Generator) -> Turns:
    """Distinct turns long enough to have a style, of authors that have two of them."""
    texts: list[str] = []
    author: list[str] = []
    for person in chosen:
        own = [text for text in dict.fromkeys(person.turns) if len(text) >= MIN_CHARS]
        own = [own[i] for i in sorted(rng.choice(len(own), min(at_most, len(own)), replace=False))] if own else own
        if len(own) >= 2:
            texts += own
            author += [person.id] * len(own)
    return Turns(texts, np.array(author), quick_vectors(texts, cache))


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


def batches(turns: Turns, rng: np.random.Generator) -> list[Array]:
    """Index pairs (anchor, positive), (b, 2): authors in neighbourhoods of topic, each with its topically most distant turns."""
    names, place = np.unique(turns.author, return_inverse=True)
    members = [np.flatnonzero(place == k) for k in range(len(names))]
    centre = np.stack([turns.topic[rows].mean(0) for rows in members])
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    found = []
    for _ in range(len(names) // (GROUPS * GROUP) + 1):
        seeds = rng.choice(len(names), GROUPS, replace=False)
        near = np.unique(np.argsort(-(centre[seeds] @ centre.T), axis=1)[:, :GROUP])
        rows = []
        for k in near:
            anchor = rng.choice(members[k])
            likeness = turns.topic[members[k]] @ turns.topic[anchor]
            rows.append((anchor, members[k][likeness.argmin()]))
        found.append(np.array(rows))
    return found


def fit(turns: Turns, epochs: int, seed: int) -> dict[str, Array]:
    """The projection: InfoNCE, positives against all other turns of the batch, both ways."""
    import torch
    from scipy.sparse import csr_matrix

    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    hashed = features.hashed_chars(turns.texts, BUCKETS)
    sparse = csr_matrix((hashed.values, hashed.indices, hashed.indptr), shape=(len(turns.texts), BUCKETS), dtype=np.float32)
    raw = style_dense(turns.texts)
    mean, scale = raw.mean(0), raw.std(0) + 1e-3
    dense = torch.tensor(np.clip((raw - mean) / scale, -5, 5), dtype=torch.float32)
    rare = 1 / np.sqrt(np.maximum(np.asarray((sparse > 0).sum(0)).ravel(), 5) / len(turns.texts))  # start from TF-IDF
    w = (
        torch.randn(BUCKETS, DIM, generator=generator) / DIM**0.5 * torch.tensor(rare[:, None], dtype=torch.float32) * 0.3
    ).requires_grad_()
    v = (torch.randn(dense.shape[1], DIM, generator=generator) / DIM**0.5 * 0.15).requires_grad_()
    bias = torch.zeros(DIM, requires_grad=True)
    steps = epochs * (len(set(turns.author)) // (GROUPS * GROUP) + 1)
    optimiser = torch.optim.AdamW([{"params": [w], "weight_decay": 0.02}, {"params": [v, bias], "weight_decay": 0.1}], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for pairs in batches(turns, rng):
            rows = pairs.T.ravel()
            block = sparse[rows].tocoo()
            x = torch.sparse_coo_tensor(np.stack([block.row, block.col]), block.data, block.shape, check_invariants=False)
            keep = (torch.rand(dense.shape[1], generator=generator) > 0.2).float() / 0.8
            z = torch.nn.functional.normalize(torch.sparse.mm(x, w) + (dense[rows] * keep) @ v + bias, dim=-1)
            likeness = z @ z.T / TEMPERATURE - 1e4 * torch.eye(len(rows))
            target = torch.arange(len(rows)).roll(len(pairs))  # row k's other half lies len(pairs) away
            loss = torch.nn.functional.cross_entropy(likeness, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return {
        "sparse": w.detach().numpy(), "dense": v.detach().numpy(), "bias": bias.detach().numpy(), "mean": mean, "scale": scale
    }  # fmt: skip


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
    return {
        "MiniLM": turns.topic,
        "character n-grams (TF-IDF)": chars,
        "function words": words,
        "habits and function words": hand,
        "character n-grams + function words": np.hstack([_unit(chars), _unit(hand)]),
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
    tensors = fit(training, EPOCHS, SEED)
    print(f"fitted after {clock()} s", flush=True)
    ours = StyleEncoder(NAME, tensors, {"threshold": 0.0})
    mine = scores(ours(val.texts), val_tests["topic controlled"].pairs)
    threshold = youden(mine, val_tests["topic controlled"].same)
    if args.tune:
        print(json.dumps(compare({NAME: ours(val.texts), **baselines(training, val)}, val_tests), indent=1), threshold)
        return
    save(NAME, tensors, {"threshold": threshold, "seed": SEED, "authors": len(set(training.author))})
    model = StyleEncoder(NAME, *read_weights(NAME))
    test, test_tests = held_out(found["test"], pool, args.cache)
    figures = compare({NAME: model(test.texts), **baselines(training, test)}, test_tests)
    figures["AVA threshold"] = round(threshold, 4)
    figures["AVA accuracy"] = _accuracy(model, test, test_tests, threshold)
    figures["trained on"] = {"authors": len(set(training.author)), "turns": len(training.texts)}
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
        f"| {name} | {shown(hard[name])} | {_behind(hard, name)} | {shown(easy[name])} |"
        for name in hard
        if " minus " not in name
    ]
    accuracy = figures["AVA accuracy"]
    return f"""
# style encoder: `style-v1`

How a text is written, as a unit vector of {DIM}: `usp_env.models.scorers.load("style-v1")(texts)`; the dot product is the similarity.

| | |
|---|---|
| model | linear projection of hashed character 1-4-grams ({BUCKETS} buckets), habits of the hand, function words and length, scaled to norm 1 |
| data | user turns of at least {MIN_CHARS} characters of real ShareGPT conversations; an author is a conversation. Trained on {figures["trained on"]["authors"]} authors, {figures["trained on"]["turns"]} turns (`train` and conversations without a profile); threshold on `val`; figures on `test`; {POOL} conversations that are in none of them lend negatives to both; reserved conversations in none |
| content control | after Wegmann et al. (2022): positive = the same author's topically most distant turn, negative = the topically nearest turn of all other authors (MiniLM) |
| loss | InfoNCE, temperature {TEMPERATURE}, {EPOCHS} epochs, batches of {GROUPS} topical neighbourhoods of {GROUP} authors |
| command | `python -m training.style_encoder`, seed {SEED}, {figures["wall seconds"]:.0f} s on 2 shared cores |

AUC of same-author pairs, 95 % intervals by bootstrap over authors ({hard["authors"]} authors, {hard["pairs"]} pairs).

| test | topic controlled | style-v1 minus it | random pairs |
|---|---|---|---|
{chr(10).join(rows)}

AVA: two texts count as one author's from a cosine of {figures["AVA threshold"]} (Youden's on `val`, topic controlled); that is right for
{shown(accuracy["topic controlled"])} of controlled and {shown(accuracy["random"])} of random pairs of `test`.

## Limits

- Under the control MiniLM lies below .5 by construction: negatives are chosen by it.
- One conversation is one author here, so that the occasion (a task, a pasted format, a mood) passes for the hand.
- Single turns are short; the similarity of two of them is noisy, means over a conversation are not.
- English.
"""  # noqa: E501 - a table row is a line


def _behind(figures: dict[str, Any], name: str) -> str:
    return "" if name == NAME else shown(figures[f"{NAME} minus {name}"])


if __name__ == "__main__":
    main()
