"""Train the verifiers: does a dialogue support a fact, does a profile support a turn, does a sentence answer a request?

    python -m training.verifiers facts          # about 10 minutes on 2 idle cores; needs `usp-env fetch minilm sharegpt`
    python -m training.verifiers answers

Writes `usp_env/models/facts-v1.safetensors`, `answer-v1.safetensors`, their twins, and the cards in `docs/models/`. All are small
networks on the features of `usp_env.models.pairs`; the twins see words, names and numbers only, no MiniLM, and other people.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.auxiliary import (
    Array,
    Clock,
    Person,
    auc,
    bootstrap,
    keep,
    people,
    quick_reader,
    quick_vectors,
    save,
    shown,
    write_card,
)
from training.near_misses import KINDS, near_misses
from usp_env.metrics.reliability import ece
from usp_env.models import pairs
from usp_env.models.facts import atomic_facts
from usp_env.models.pairs import FEATURES, LEXICAL, names_of
from usp_env.models.scorers import pair_matrix, profile_units, read_weights

SEED = 0
TWIN_PEOPLE = 400
NEIGHBOURS = 5


class Pair(NamedTuple):
    """One question.

    Attributes:
        cluster: The conversation that the claim is about.
        claim: A statement, or a user turn.
        evidence: User turns, or a profile's sentences.
        kind: `true`, or why it is false: `random`, `neighbour`, `near: tool` and so on.
    """

    cluster: str
    claim: str
    evidence: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Crowd:
    """People, and for each the others by nearness of topic."""

    people: list[Person]
    vectors: Array

    def nearest(self, vector: Array, own: str, n: int) -> list[Person]:
        """The n people whose turns are topically nearest, but for one's own."""
        found: list[Person] = []
        for k in np.argsort(-(self.vectors @ vector)):
            if self.people[int(k)].id != own:
                found.append(self.people[int(k)])
            if len(found) == n:
                break
        return found


def crowd(chosen: Sequence[Person], cache: Path | None) -> Crowd:
    """A topic vector for each person: MiniLM of the first 400 characters of their turns together."""
    return Crowd(list(chosen), quick_vectors([_topic(person) for person in chosen], cache))


def _topic(person: Person) -> str:
    return " ".join(turn[:150] for turn in person.turns)[:400]


class Names(NamedTuple):
    """Names in people's statements and their vectors."""

    names: list[str]
    vectors: Array


def names_in(chosen: Sequence[Person], cache: Path | None) -> Names:
    """What tools can be exchanged for."""
    found = sorted({name for p in chosen if p.profile for name in names_of(p.profile.objective)})
    return Names(found, quick_vectors(found, cache))


def fact_pairs(chosen: Sequence[Person], others: Crowd, topics: Array, names: Names, train: bool, seed: int) -> list[Pair]:
    """Each atomic fact with its own dialogue (true), a stranger's (one a person), a neighbour's, and near misses with its own."""
    rng, found = np.random.default_rng(seed), []
    for person, topic in zip(chosen, topics, strict=True):
        assert person.profile is not None
        near = others.nearest(topic, person.id, NEIGHBOURS if train else 1)
        own, said = tuple(person.turns), " ".join(person.turns)
        stranger = others.people[int(rng.integers(len(others.people)))]
        for fact in atomic_facts(person.profile.objective):
            found.append(Pair(person.id, fact, own, "true"))
            if stranger.id != person.id:
                found.append(Pair(person.id, fact, tuple(stranger.turns), "random"))
            found.append(Pair(person.id, fact, tuple(near[int(rng.integers(len(near)))].turns), "neighbour"))
            found += [Pair(person.id, miss.text, own, f"near: {miss.kind}") for miss in near_misses(fact, said, *names, rng)]
    return found


def turn_pairs(chosen: Sequence[Person], others: Crowd, topics: Array, train: bool, seed: int) -> list[Pair]:
    """Each turn (six a person at most in training) with its own profile (true), a random one, and a topical neighbour's."""
    rng, found = np.random.default_rng(seed), []
    for person, topic in zip(chosen, topics, strict=True):
        near = others.nearest(topic, person.id, NEIGHBOURS if train else 1)
        turns = [turn for turn in person.turns if turn.strip()]
        if train and len(turns) > 6:
            turns = [turns[i] for i in sorted(rng.choice(len(turns), 6, replace=False))]
        stranger = others.people[int(rng.integers(len(others.people)))]
        for turn in turns:
            for who, kind in ((person, "true"), (stranger, "random"), (near[int(rng.integers(len(near)))], "neighbour")):
                if kind == "true" or who.id != person.id:
                    found.append(Pair(person.id, turn, tuple(profile_units(str(who.profile))), kind))
    return found


def idf_of(chosen: Sequence[Person], tokenizer: Any) -> Array:
    """log((N + 1) / (n_piece + 1)) over conversations' user turns and profiles, (vocabulary,)."""
    documents = [text for p in chosen for text in (" ".join(p.turns)[:6000], str(p.profile) if p.profile else "") if text]
    counts = np.zeros(len(tokenizer))
    for ids in tokenizer(documents, truncation=True, max_length=2000)["input_ids"]:
        counts[np.unique(ids)] += 1
    return np.log((len(documents) + 1) / (counts + 1))


def fit_network(
    x: Array, y: Array, weight: Array, hidden: tuple[int, ...], seed: int, columns: Sequence[int]
) -> dict[str, Array]:
    """A standardised network as the tensors of a `Head`; columns outside `columns` get weight 0. Weights by repetition.

    Training stops early by rows that it also learns from, as scikit-learn holds rows out after the repetition: this bounds the
    iterations and says nothing about new people. What is measured and calibrated is other people's (`val`, `test`).
    """
    from sklearn.neural_network import MLPClassifier

    mean, scale = x.mean(0), x.std(0) + 1e-3
    z = np.clip((x - mean) / scale, -6, 6)[:, columns]
    rng = np.random.default_rng(seed)
    draw = rng.choice(len(z), len(z), p=weight / weight.sum())
    model = MLPClassifier(
        hidden, alpha=1e-2, learning_rate_init=2e-3, early_stopping=True, n_iter_no_change=6, max_iter=60, random_state=seed
    )
    model.fit(z[draw], y[draw])
    first = np.zeros((x.shape[1], model.coefs_[0].shape[1]))
    first[list(columns)] = model.coefs_[0]
    out = {"mean": mean, "scale": scale, "w0": first}
    out |= {f"w{k}": w for k, w in enumerate(model.coefs_) if k} | {f"b{k}": b for k, b in enumerate(model.intercepts_)}
    return out


def prefixed(prefix: str, tensors: dict[str, Array]) -> dict[str, Array]:
    """The tensors with `PREFIX.` before their names."""
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def balance(kinds: Array, shares: dict[str, float]) -> Array:
    """Weights that give each kind (by the longest matching prefix) its share."""
    group = np.array([max((key for key in shares if kind.startswith(key)), key=len, default="") for kind in kinds])
    weight = np.zeros(len(kinds))
    for key, share in shares.items():
        weight[group == key] = share / max((group == key).sum(), 1)
    return weight


FACT_SHARES = {"true": 0.5, "random": 0.1, "neighbour": 0.15, "near": 0.25}
TURN_SHARES = {"true": 0.5, "random": 0.15, "neighbour": 0.35}


class Questions(NamedTuple):
    """Pairs, their features from MiniLM states, and their features from words alone."""

    pairs: list[Pair]
    x: Array
    lexical: Array

    @property
    def kinds(self) -> Array:
        """Kind of each pair."""
        return np.array([pair.kind for pair in self.pairs])


def digest_of(found: Sequence[Pair], idf: Array) -> str:
    """What the features of pairs are made of, in 16 hex digits."""
    asked = json.dumps([FEATURES, [[pair.claim, pair.evidence] for pair in found]]).encode()
    return hashlib.sha256(asked + np.asarray(idf).tobytes()).hexdigest()[:16]


def featured(found: list[Pair], read: Callable[..., Any] | None, idf: Array, cache: Path | None, name: str) -> Questions:
    """Both feature matrices of the pairs; a reader of None leaves the first at zero.

    `cache` keeps them under `name` and a digest of the pairs, the word counts and the features' names.
    """
    file = cache / f"{name}-{digest_of(found, idf)}.npz" if cache else None
    if file and file.is_file():
        kept = np.load(file)
        return Questions(found, kept["x"], kept["lexical"])
    claims, evidence = [pair.claim for pair in found], [pair.evidence for pair in found]
    lexical = pair_matrix(pairs.word_reader(), idf, claims, evidence)
    x = pair_matrix(read, idf, claims, evidence) if read else np.zeros_like(lexical)
    if file:
        keep(file, lambda stream: np.savez(stream, x=x, lexical=lexical))
    return Questions(found, x, lexical)


def measure(found: Questions, p: Array, plain: Array, seed: int = 0) -> dict[str, Any]:
    """AUC against each kind of false pair, ours, plain MiniLM cosine, and their difference; calibration over all kinds."""
    kinds, clusters = found.kinds, np.array([pair.cluster for pair in found.pairs])
    figures: dict[str, Any] = {}
    wanted = [*dict.fromkeys(kind.split(":")[0] for kind in kinds if kind != "true"), *(f"near: {k}" for k in KINDS)]
    for kind in wanted:
        false = np.char.startswith(kinds, kind)
        if not false.any():
            continue
        # Near misses are compared with the statements that they were made from, not with ones that have no such detail.
        true = kinds == "true" if not kind.startswith("near") else _origins(found, false)
        rows = np.flatnonzero(true | false)
        own, y = list(clusters[rows]), kinds[rows] == "true"
        ours, cosine = p[rows], plain[rows]
        figures[kind] = {
            "n": [int(y.sum()), int((~y).sum())],
            "ours": bootstrap(own, lambda i: auc(ours[i], y[i])),  # noqa: B023 - called at once
            "MiniLM": bootstrap(own, lambda i: auc(cosine[i], y[i])),  # noqa: B023
            "ours minus MiniLM": bootstrap(own, lambda i: auc(ours[i], y[i]) - auc(cosine[i], y[i])),  # noqa: B023
        }
    figures["ECE"] = bootstrap(list(clusters), lambda i: ece(p[i], kinds[i] == "true"))
    return figures


def _origins(found: Questions, near: Array) -> Array:
    """Which true pairs a near miss was made from: the last true one before it."""
    mask, last = np.zeros(len(near), bool), -1
    for k, pair in enumerate(found.pairs):
        last = k if pair.kind == "true" else last
        mask[last] |= near[k]
    return mask


@dataclass(frozen=True)
class Setting:
    """Everybody, topic vectors of everybody, names to exchange, and where to keep what is slow."""

    found: dict[str, list[Person]]
    everyone: Crowd
    cache: Path | None

    def topics(self, chosen: Sequence[Person]) -> Array:
        """Topic vectors of the chosen, (n, 384)."""
        place = {person.id: k for k, person in enumerate(self.everyone.people)}
        return self.everyone.vectors[[place[person.id] for person in chosen]]

    def among(self, chosen: Sequence[Person]) -> Crowd:
        """A crowd of the chosen alone."""
        return Crowd(list(chosen), self.topics(chosen))


def prepare(cache: Path | None) -> Setting:
    """Read the conversations and place everybody by topic."""
    found = people(SEED)
    return Setting(found, crowd([p for split in ("train", "val", "test", "other") for p in found[split]], cache), cache)


def fact_task(setting: Setting, chosen: Sequence[Person], train: bool, seed: int) -> list[Pair]:
    """Fact questions: neighbours from the same people in training, from everybody else in val and test."""
    crowd_ = setting.among(chosen) if train else setting.everyone
    return fact_pairs(chosen, crowd_, setting.topics(chosen), names_in(chosen, setting.cache), train, seed)


def turn_task(setting: Setting, chosen: Sequence[Person], train: bool, seed: int) -> list[Pair]:
    """Turn questions: neighbours from the same people in training, from all people with a profile in val and test."""
    known = [p for split in ("train", "val", "test") for p in setting.found[split]]
    return turn_pairs(chosen, setting.among(chosen if train else known), setting.topics(chosen), train, seed)


TASKS: dict[str, tuple[Callable[..., list[Pair]], dict[str, float]]] = {
    "fact": (fact_task, FACT_SHARES),
    "turn": (turn_task, TURN_SHARES),
}


def train_facts(cache: Path | None, tune: bool, n_people: int) -> None:
    """Both heads of `facts-v1` and of its twin."""
    from usp_env.models import embedders

    clock, setting = Clock(), prepare(cache)
    train = setting.found["train"]
    order = np.random.default_rng(SEED).permutation(len(train))
    twin_people = [train[k] for k in order[:TWIN_PEOPLE]]
    main_people = [train[k] for k in order[TWIN_PEOPLE:]][:n_people]
    tokenizer = embedders.load("minilm")._tokenizer  # type: ignore[attr-defined]
    idf = idf_of([*main_people, *setting.found["other"]], tokenizer).astype(np.float16)
    read = quick_reader()
    print(f"{len(main_people)} people, topics after {clock()} s", flush=True)
    tensors: dict[str, Array] = {"idf": idf}
    twin: dict[str, Array] = {"idf": idf}
    for head, (task, shares) in TASKS.items():
        main = featured(task(setting, main_people, True, SEED), read, idf, cache, f"{head}-{n_people}")
        other = featured(task(setting, twin_people, True, SEED + 1), None, idf, cache, f"{head}-twin")
        val = featured(task(setting, setting.found["val"], False, SEED + 2), read, idf, cache, f"{head}-val")
        print(f"{head}: {len(main.pairs)} pairs after {clock()} s", flush=True)
        tensors |= prefixed(head, fit_head(main, val, shares, range(len(FEATURES)), (48, 24), lexical=False))
        twin |= prefixed(head, fit_head(other, val, shares, LEXICAL, (24,), lexical=True))
        if tune:
            print(head, json.dumps(evaluate(head, tensors, twin, val), indent=1), flush=True)
    if tune:
        return
    meta = {"seed": SEED, "people": len(main_people)}
    save("facts-v1", tensors, meta)
    save("facts-v1-twin", twin, {"seed": SEED, "people": len(twin_people)})
    shipped, shipped_twin = (read_weights(name)[0] for name in ("facts-v1", "facts-v1-twin"))
    figures: dict[str, Any] = {}
    for head, (task, _) in TASKS.items():
        test = featured(task(setting, setting.found["test"], False, SEED + 3), read, idf, cache, f"{head}-test")
        figures[head] = evaluate(head, shipped, shipped_twin, test)
    figures["trained on"] = {"people": len(main_people), "twin": len(twin_people)}
    figures["everybody"] = len(setting.everyone.people)
    figures["wall seconds"] = clock()
    print(json.dumps(figures, indent=1))
    write_card("fact_verifier", fact_card(figures), figures)


def fit_head(
    found: Questions, val: Questions, shares: dict[str, float], columns: Sequence[int], hidden: tuple[int, ...], lexical: bool
) -> dict[str, Array]:
    """Train, then fold Platt's scaling on val into the last layer."""
    from training.auxiliary import platt
    from usp_env.models.scorers import Head

    x, held = (found.lexical, val.lexical) if lexical else (found.x, val.x)
    tensors = fit_network(x, found.kinds == "true", balance(found.kinds, shares), hidden, SEED, columns)
    a, b = platt(Head.read(prefixed("h", tensors), "h")(held), val.kinds == "true", balance(val.kinds, shares) * len(held))
    last = max(key for key in tensors if key.startswith("w"))
    tensors[last] = tensors[last] * a
    tensors["b" + last[1:]] = tensors["b" + last[1:]] * a + b
    return tensors


def evaluate(head: str, tensors: dict[str, Array], twin: dict[str, Array], found: Questions) -> dict[str, Any]:
    """Both models' figures beside plain MiniLM: the claim's best cosine over the evidence's units."""
    from usp_env.models.scorers import Head, sigmoid

    plain = found.x[:, FEATURES.index("cos max")]
    p = sigmoid(Head.read(tensors, head)(found.x))
    q = sigmoid(Head.read(twin, head)(found.lexical))
    return {"main": measure(found, p, plain), "twin": measure(found, q, plain)}


def fact_card(figures: dict[str, Any]) -> str:
    """The card's prose."""
    blocks = []
    for head, title in (("fact", "dialogue → fact"), ("turn", "profile → user turn")):
        main, twin = figures[head]["main"], figures[head]["twin"]
        rows = []
        for kind, v in main.items():
            if kind != "ECE":
                cells = [
                    f"{v['n'][0]} / {v['n'][1]}",
                    *map(shown, (v["ours"], v["MiniLM"], v["ours minus MiniLM"], twin[kind]["ours"])),
                ]
                rows.append(f"| {kind} | {' | '.join(cells)} |")
        blocks.append(
            f"### {title}\n\n| false pairs | n true / false | AUC facts-v1 | AUC MiniLM | difference | AUC twin |\n"
            + "|---|---|---|---|---|---|\n"
            + "\n".join(rows)
            + f"\n\nCalibration error (10 bins, this mix of pairs): {shown(main['ECE'])}, twin {shown(twin['ECE'])}."
        )
    return f"""
# fact verifier: `facts-v1`, twin `facts-v1-twin`

p(a dialogue's user turns support an atomic fact) and p(a profile supports a user turn):
`usp_env.models.scorers.load("facts-v1").supported(turns, facts)` and `.explains(profiles, turns)`.

| | |
|---|---|
| model | two networks (48, 24 units) on {len(FEATURES)} features of a (claim, evidence) pair: MiniLM cosines over units, late interaction of token states of two layers (how well is each word of the claim matched, and the worst ones), word pieces weighted by IDF, names and numbers that the evidence lacks, the order of the matches (`usp_env/models/pairs.py`) |
| twin | a network on the {len(LEXICAL)} columns that need no MiniLM, other people, evaluation only |
| data | real ShareGPT conversations and their packaged profiles: {figures["trained on"]["people"]} people of `train` (twin: {figures["trained on"]["twin"]} others), Platt's scaling on `val`, figures on `test`; reserved conversations in none. Facts: `usp_env.models.facts.atomic_facts` of the objective paragraph; profile units: its sentences, both paragraphs |
| false pairs | a random other person; the topically nearest of all {figures["everybody"]} usable conversations (facts) or of all profiles (turns), by MiniLM of the user turns; near misses (`training/near_misses.py`): the same fact with its number, name of a tool, place or order changed, against the facts that were changed |
| plain MiniLM | the claim's largest cosine with a unit of the evidence |
| command | `python -m training.verifiers facts --people {figures["trained on"]["people"]}`, seed {SEED}, {figures["wall seconds"]:.0f} s on 2 shared cores |

95 % intervals: bootstrap over conversations.

{blocks[0]}

{blocks[1]}

## Limits

- Near misses are made by rules; a person's own contradictions are subtler. Changed order is the hardest kind.
- A long turn is read in part: of each unit the first 94 word pieces (57 of the 812 user turns of `test` are longer; 15 % of all word pieces are
  not read), and its first 1,200 characters for names and numbers.
- Only what the user writes is evidence: a name that only the assistant used counts as missing.
- Turns like "continue" fit any profile; no model tells whose they are.
- Facts about style ("You write in small letters") are not what the fact head was trained on; use the style encoder. English.
"""  # noqa: E501 - a table row is a line


def main() -> None:
    """Train one of the two families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("facts", "answers"))
    parser.add_argument("--people", type=int, default=900, help="of the train split, for the main models")
    parser.add_argument("--cache", type=Path, help="folder that keeps features between runs")
    parser.add_argument("--tune", action="store_true", help="measure on val and write nothing")
    args = parser.parse_args()
    if args.what == "answers":
        from training.answer_verifier import train_answers  # it builds on this module

        train_answers(args.cache, args.tune, args.people)
    else:
        train_facts(args.cache, args.tune, args.people)


if __name__ == "__main__":
    main()
