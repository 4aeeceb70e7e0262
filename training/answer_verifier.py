"""The answer verifier: real replies against what earns similarity without answering. Run by `training.verifiers answers`.

Used are conversations whose profile has one request for each user turn, in order: there, reply i is the answer to request i. A
request is put both as the profile has it and in the user's own words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.auxiliary import Array, Clock, Person, auc, bootstrap, platt, quick_reader, save, shown, write_card, youden
from training.verifiers import SEED, Setting, balance, fit_network, idf_of, prefixed, prepare
from usp_env.metrics.reliability import ece
from usp_env.models import features, pairs
from usp_env.models.scorers import ANSWER_EXTRAS, Head, about, answer_extras, pair_matrix, read_weights, sigmoid
from usp_env.rewards.goal import MAX_SENTENCES, candidates, sentences

TWIN_PEOPLE = 250
BUILT = 200
SHARES = {"answer": 0.5, "echo": 0.12, "spam": 0.08, "opener": 0.08, "stranger": 0.1, "neighbour": 0.06, "other reply": 0.06}
GATE = (12.0, 0.3)
"""Slope and middle of `about`: of four, the one that won most built cases of val (.944; .927 without)."""
STOCK = (
    "Sure, I can help you with that!", "Let me know if you have any other questions.", "Here is the answer to your request:",
    "I hope this helps!", "That is a great question.", "As an AI language model, I do not have personal opinions.",
)  # fmt: skip
LEXICAL = (*pairs.LEXICAL, *(len(pairs.FEATURES) + k for k, name in enumerate(ANSWER_EXTRAS) if name != "human"))


class Sentence(NamedTuple):
    """One question: does the sentence answer the request?

    Attributes:
        cluster: The conversation.
        text: The sentence.
        request: What was asked.
        kind: `answer`, or how it fails to be one.
    """

    cluster: str
    text: str
    request: str
    kind: str


class Built(NamedTuple):
    """A built case: a request and the sentences of each rival reply."""

    cluster: str
    request: str
    replies: dict[str, list[str]]


def aligned(chosen: Sequence[Person]) -> list[Person]:
    """The people with one request for each user turn."""
    return [p for p in chosen if p.profile and len(p.profile.task_details) == len(p.turns) == len(p.replies)]


def own_sentences(person: Person, i: int) -> list[str]:
    """The sentences of reply i that count as the person's answer."""
    return list(candidates(person.replies[i], tuple(person.turns[: i + 1])))


def is_opener(sentence: str) -> bool:
    """Whether a sentence only announces, apologises or takes leave."""
    return sentence.rstrip().endswith(":") or features.OPENER.match(sentence.strip()) is not None


def spam(request: str, rng: np.random.Generator) -> str:
    """The request's content words over and over."""
    known = [
        w for w in features.words(request) if w[0].isalnum() and w.casefold() not in features.FUNCTION_INDEX
    ] or request.split()
    rows = [list(rng.permutation(known)) for _ in range(int(rng.integers(2, 5)))]
    text = (" ", ", ", " and ", ". ")[int(rng.integers(4))].join(word for row in rows for word in row)
    return ("", "Best ", "All about ", "The ")[int(rng.integers(4))] + text[:300]


def training_sentences(chosen: Sequence[Person], setting: Setting, seed: int, per: int = 3) -> list[Sentence]:
    """True and false answers to every request of the chosen, each request in one of its two wordings."""
    rng, found = np.random.default_rng(seed), []
    crowd = setting.among(chosen)
    for n, person in enumerate(chosen):
        near = crowd.nearest(crowd.vectors[n], person.id, 3)
        assert person.profile is not None
        for i, (detail, turn) in enumerate(zip(person.profile.task_details, person.turns, strict=True)):
            request, other = (detail, turn) if rng.random() < 0.65 else (turn[:400], detail)
            own = own_sentences(person, i)
            stranger = chosen[(n + 1 + int(rng.integers(len(chosen) - 1))) % len(chosen)]
            made = {
                "answer": _pick(rng, [s for s in own if not is_opener(s)], per),
                "opener": [*_pick(rng, [s for s in own if is_opener(s)], 1), *_pick(rng, STOCK, 1)],
                "echo": [*_pick(rng, sentences(request), 1), *_pick(rng, sentences(other[:400]), 1)],
                "spam": [spam(request, rng)],
                "stranger": _pick(rng, _any(stranger, rng), 2),
                "neighbour": _pick(rng, _any(near[int(rng.integers(len(near)))], rng), 1),
                "other reply": _pick(
                    rng, own_sentences(person, (i + 1 + int(rng.integers(len(person.turns) - 1))) % len(person.turns)), 1
                ),
            }
            found += [Sentence(person.id, text[:600], request, kind) for kind, texts in made.items() for text in texts]
    return found


def _any(person: Person, rng: np.random.Generator) -> list[str]:
    return sentences(person.replies[int(rng.integers(len(person.replies)))])[:MAX_SENTENCES]


def _pick(rng: np.random.Generator, texts: Sequence[str], n: int) -> list[str]:
    return [texts[i] for i in sorted(rng.choice(len(texts), min(n, len(texts)), replace=False))] if texts else []


def built_cases(chosen: Sequence[Person], n: int | None, seed: int) -> list[Built]:
    """Requests (details) with the right reply, an echo, a keyword spammer, an off-topic essay, and two harder rivals."""
    rng, found = np.random.default_rng(seed), []
    for k, person in enumerate(chosen):
        assert person.profile is not None
        for i, detail in enumerate(person.profile.task_details):
            right = own_sentences(person, i)
            stranger = chosen[(k + 1 + int(rng.integers(len(chosen) - 1))) % len(chosen)]
            longest = max(stranger.replies, key=len)
            replies = {
                "right": right,
                "echo of the request": [detail],
                "echo of the turn": sentences(person.turns[i][:1000])[:MAX_SENTENCES],
                "keyword spammer": [spam(detail, rng)],
                "off-topic essay": sentences(longest)[:MAX_SENTENCES],
                "stock reply": list(STOCK),
                "another reply of the conversation": own_sentences(person, (i + 1) % len(person.turns)),
            }
            if right:
                found.append(Built(person.id, detail, replies))
    order = np.random.default_rng(seed + 1).permutation(len(found))
    return [found[i] for i in (order if n is None else order[:n])]


Score = Callable[[Sequence[str], Sequence[str]], Array]


def best_scores(score: Score, cases: Sequence[Built]) -> dict[str, Array]:
    """For each kind of reply its best sentence's score in every case, (n,); −1 where it has no sentence."""
    flat = [(text[:600], case.request) for case in cases for texts in case.replies.values() for text in texts]
    values = iter(score([text for text, _ in flat], [request for _, request in flat]))
    rows: dict[str, list[float]] = {}
    for case in cases:
        for kind, texts in case.replies.items():
            rows.setdefault(kind, []).append(max([next(values) for _ in texts], default=-1.0))
    return {kind: np.array(row) for kind, row in rows.items()}


def judge(score: Score, cases: Sequence[Built]) -> dict[str, Any]:
    """Share of cases in which the right reply beats each rival, and all of the three that acceptance names; mean scores."""
    best, clusters = best_scores(score, cases), [case.cluster for case in cases]
    figures: dict[str, Any] = {"cases": len(cases)}
    wins = {kind: best["right"] > value for kind, value in best.items() if kind != "right"}
    wins["echo, spammer and essay at once"] = np.logical_and.reduce(
        [wins[kind] for kind in ("echo of the request", "keyword spammer", "off-topic essay")]
    )
    for kind, won in wins.items():
        figures[f"right above {kind}"] = bootstrap(clusters, lambda i: float(won[i].mean()))  # noqa: B023 - called at once
    figures["mean"] = {kind: round(float(np.maximum(value, 0).mean()), 3) for kind, value in best.items()}
    y = np.repeat([True, False], len(cases))
    for kind in ("another reply of the conversation", "off-topic essay"):
        both = np.concatenate([best["right"], best[kind]])
        figures[f"AUC against {kind}"] = bootstrap([*clusters, *clusters], lambda i: auc(both[i], y[i]))  # noqa: B023
    return figures


def raising_pairs(chosen: Sequence[Person], seed: int) -> tuple[list[str], list[str], Array, list[str]]:
    """(requests, utterances, whether one makes the other, clusters): own turn, two others of one's own, a stranger's."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, str, bool, str]] = []
    for k, person in enumerate(chosen):
        assert person.profile is not None
        for i, detail in enumerate(person.profile.task_details):
            stranger = chosen[(k + 1 + int(rng.integers(len(chosen) - 1))) % len(chosen)]
            others = [turn for j, turn in enumerate(person.turns) if j != i]
            rows.append((detail, person.turns[i], True, person.id))
            rows += [(detail, turn, False, person.id) for turn in [*_pick(rng, others, 2), *_pick(rng, stranger.turns, 1)]]
    return [r[0] for r in rows], [r[1] for r in rows], np.array([r[2] for r in rows]), [r[3] for r in rows]


def raised_first(raising: Score, chosen: Sequence[Person], threshold: float) -> dict[str, float]:
    """Shares of requests first recognised in their own turn, earlier, later, never."""
    rows = [(n, i, j) for n, p in enumerate(chosen) for i in range(len(p.turns)) for j in range(len(p.turns))]
    details = [chosen[n].profile.task_details[i] for n, i, _ in rows]  # type: ignore[union-attr]
    hits = raising([chosen[n].turns[j] for n, _, j in rows], details) >= threshold
    first: dict[tuple[int, int], int | None] = {}
    for (n, i, j), hit in zip(rows, hits, strict=True):
        first.setdefault((n, i), None)
        if hit and first[n, i] is None:
            first[n, i] = j
    kinds = ["never" if j is None else "right" if j == i else "early" if j < i else "late" for (_, i), j in first.items()]
    return {kind: round(kinds.count(kind) / len(kinds), 3) for kind in ("right", "early", "late", "never")}


class Builder:
    """Features and scores under training."""

    def __init__(self, read: Callable[..., Any], idf: Array) -> None:
        self.read, self.idf = read, idf

    def answer(self, texts: Sequence[str], requests: Sequence[str]) -> Array:
        """Features of the head `answer`, (n, f)."""
        x = pair_matrix(self.read, self.idf, requests, [[text] for text in texts])
        return np.hstack([x, answer_extras(self.read, self.idf, texts, requests)])

    def raised(self, texts: Sequence[str], requests: Sequence[str]) -> Array:
        """Features of the head `raised`, (n, f)."""
        return pair_matrix(self.read, self.idf, requests, [[text] for text in texts])

    def score(self, tensors: dict[str, Array], head: str, gate: Sequence[float] | None = None) -> Score:
        """A head as a function of texts and requests."""

        def scored(texts: Sequence[str], requests: Sequence[str]) -> Array:
            x = getattr(self, head)(texts, requests)
            return sigmoid(Head.read(tensors, head)(x)) * about(x, gate)

        return scored


def fit(
    builder: Builder, train: list[Sentence], chosen: Sequence[Person], val: Sequence[Person], setting: Setting, lexical: bool
) -> dict[str, Any]:
    """Tensors of both heads, calibrated on val, and the threshold of `raised`."""
    columns = LEXICAL if lexical else range(len(pairs.FEATURES) + len(ANSWER_EXTRAS))
    kinds = np.array([s.kind for s in train])
    x = builder.answer([s.text for s in train], [s.request for s in train])
    tensors = prefixed("answer", fit_network(x, kinds == "answer", balance(kinds, SHARES), (32, 16), SEED, columns))
    held = training_sentences(val, setting, SEED + 7)
    held_kinds = np.array([s.kind for s in held])
    z = Head.read(tensors, "answer")(builder.answer([s.text for s in held], [s.request for s in held]))
    _scale_last(tensors, "answer", platt(z, held_kinds == "answer", balance(held_kinds, SHARES) * len(held)))
    requests, texts, y, _ = raising_pairs(chosen, SEED)
    own = [c for c in columns if c < len(pairs.FEATURES)]
    tensors |= prefixed("raised", fit_network(builder.raised(texts, requests), y, np.ones(len(y)), (24,), SEED, own))
    requests, texts, y, _ = raising_pairs(val, SEED + 1)
    z = Head.read(tensors, "raised")(builder.raised(texts, requests))
    _scale_last(tensors, "raised", platt(z, y, np.ones(len(y))))
    return {"tensors": tensors, "raised": youden(builder.score(tensors, "raised")(texts, requests), y)}


def _scale_last(tensors: dict[str, Array], head: str, scaling: tuple[float, float]) -> None:
    last = max(int(key.rpartition("w")[2]) for key in tensors if key.startswith(f"{head}.w"))
    tensors[f"{head}.w{last}"] = tensors[f"{head}.w{last}"] * scaling[0]
    tensors[f"{head}.b{last}"] = tensors[f"{head}.b{last}"] * scaling[0] + scaling[1]


def train_answers(cache: Path | None, tune: bool, n_people: int) -> None:
    """`answer-v1` and its twin."""
    from usp_env.models import embedders

    clock, setting = Clock(), prepare(cache)
    usable = aligned(setting.found["train"])
    order = np.random.default_rng(SEED).permutation(len(usable))
    twin_people = [usable[k] for k in order[:TWIN_PEOPLE]]
    main_people = [usable[k] for k in order[TWIN_PEOPLE:]][:n_people]
    val, test = aligned(setting.found["val"]), aligned(setting.found["test"])
    idf = idf_of(setting.found["other"], embedders.load("minilm")._tokenizer).astype(np.float16)  # type: ignore[attr-defined]
    main, words = Builder(quick_reader(), idf), Builder(pairs.word_reader(), idf)
    print(f"{len(main_people)} people after {clock()} s", flush=True)
    made = fit(main, training_sentences(main_people, setting, SEED), main_people, val, setting, lexical=False)
    print(f"main model after {clock()} s", flush=True)
    twin = fit(words, training_sentences(twin_people, setting, SEED), twin_people, val, setting, lexical=True)
    print(f"twin after {clock()} s", flush=True)
    if tune:
        print(json.dumps(report(main, words, made, twin, val, setting, None), indent=1))
        return
    for name, model, n in (("answer-v1", made, len(main_people)), ("answer-v1-twin", twin, len(twin_people))):
        gate = {"gate": GATE} if name == "answer-v1" else {}
        save(name, {"idf": idf, **model["tensors"]}, {"seed": SEED, "people": n, "raised": model["raised"], **gate})
        model["tensors"] = read_weights(name)[0]
    figures = report(main, words, made, twin, test, setting, BUILT)
    figures["trained on"] = {"people": len(main_people), "twin": len(twin_people)}
    figures["wall seconds"] = clock()
    print(json.dumps(figures, indent=1))
    write_card("answer_verifier", card(figures), figures)


def report(
    main: Builder,
    words: Builder,
    made: dict[str, Any],
    twin: dict[str, Any],
    chosen: Sequence[Person],
    setting: Setting,
    n: int | None,
) -> dict[str, Any]:
    """All figures on the chosen."""
    cases = built_cases(chosen, n, SEED)
    column = pairs.FEATURES.index("cos max")
    score = main.score(made["tensors"], "answer", GATE)
    figures: dict[str, Any] = {
        "answer-v1": judge(score, cases),
        "answer-v1-twin": judge(words.score(twin["tensors"], "answer"), cases),
        "MiniLM": judge(lambda texts, requests: main.raised(texts, requests)[:, column], cases),
    }
    held = training_sentences(chosen, setting, SEED + 9)
    p, y = score([s.text for s in held], [s.request for s in held]), np.array([s.kind == "answer" for s in held])
    clusters = [s.cluster for s in held]
    figures["ECE, sentences"] = bootstrap(clusters, lambda i: ece(p[i], y[i]))
    figures["AUC, sentences"] = bootstrap(clusters, lambda i: auc(p[i], y[i]))
    requests, texts, y2, own = raising_pairs(chosen, SEED + 3)
    raising = main.score(made["tensors"], "raised")
    q, cosine = raising(texts, requests), main.raised(texts, requests)[:, column]
    figures["raised"] = {
        "AUC": bootstrap(own, lambda i: auc(q[i], y2[i])),
        "AUC, MiniLM": bootstrap(own, lambda i: auc(cosine[i], y2[i])),
        "threshold": round(made["raised"], 4),
        "first recognised": raised_first(raising, chosen, made["raised"]),
        "first recognised, MiniLM at .55": raised_first(lambda t, r: main.raised(t, r)[:, column], chosen, 0.55),
    }
    return figures


def card(figures: dict[str, Any]) -> str:
    """The card's prose."""
    own, twin, plain = figures["answer-v1"], figures["answer-v1-twin"], figures["MiniLM"]
    keys = [key for key in own if key.startswith(("right above", "AUC"))]
    rows = [f"| {key} | {shown(own[key])} | {shown(twin[key])} | {shown(plain[key])} |" for key in keys]
    rows += [
        f"| mean score, {kind} | {own['mean'][kind]} | {twin['mean'][kind]} | {plain['mean'][kind]} |" for kind in own["mean"]
    ]
    raised = figures["raised"]
    return f"""
# answer verifier: `answer-v1`, twin `answer-v1-twin`

p(a sentence of the assistant's reply answers the user's request): `usp_env.models.scorers.load("answer-v1")(sentences, requests)`, the
scorer `answer-v1` of the reward `goal` (`GoalProgress("answer-v1")`). `raised(utterances, requests)`: does the user's turn make the request?

| | |
|---|---|
| model | networks (32, 16 units; raised: 24) on {len(pairs.FEATURES)} features of the pair (as in `fact_verifier.md`, the request as the claim) and {len(ANSWER_EXTRAS)} of the sentence: what it adds, repetition, prose or a heap of words, how an assistant announces and takes leave, P(human) of `human-v1`; the first's probability times σ({GATE[0]:g} (cosine − {GATE[1]:g})) of sentence and request by MiniLM, chosen on `val` |
| twin | the columns that need no model, other people; evaluation only |
| data | real ShareGPT conversations with one request of the profile for each user turn: {figures["trained on"]["people"]} of `train` (twin: {figures["trained on"]["twin"]} others), Platt's scaling and thresholds on `val`, figures on `test`; reserved conversations in none |
| true | sentences of the real reply (first {MAX_SENTENCES}, no copies), but for announcements and stock phrases |
| false | echo (the request, the turn, in their own and in the other's words), keyword heaps, announcements and stock phrases, sentences of a random and of a topically near stranger's replies and of another reply of the same conversation |
| command | `python -m training.verifiers answers --people {figures["trained on"]["people"]}`, seed {SEED}, {figures["wall seconds"]:.0f} s on 2 shared cores |

{own["cases"]} built cases of `test`: a request, the real reply and its rivals, each scored by its best sentence as the reward does. 95 %
intervals by bootstrap over conversations.

| test | answer-v1 | twin | MiniLM cosine |
|---|---|---|---|
{chr(10).join(rows)}

Single sentences: AUC {shown(figures["AUC, sentences"])}, calibration error {shown(figures["ECE, sentences"])}.

Raised, on `test`: AUC of own turns against other turns {shown(raised["AUC"])}, MiniLM {shown(raised["AUC, MiniLM"])}. Requests first recognised in
their own turn {raised["first recognised"]["right"]:.0%}, earlier {raised["first recognised"]["early"]:.0%}, later {raised["first recognised"]["late"]:.0%}, never {raised["first recognised"]["never"]:.0%} (threshold {raised["threshold"]}); MiniLM at
.55: {raised["first recognised, MiniLM at .55"]["right"]:.0%}, {raised["first recognised, MiniLM at .55"]["early"]:.0%}, {raised["first recognised, MiniLM at .55"]["late"]:.0%}, {raised["first recognised, MiniLM at .55"]["never"]:.0%}.

## Limits

- It tells an answer from what is none (echo, keywords, announcements, other topics); it cannot tell a right answer from a wrong one
  of the same kind, and another reply of the same conversation is often taken for an answer.
- The score is a product: the network is calibrated, the factor on the cosine comes after it, so that true answers get less than their
  probability (.58 on average where .82 would be calibrated, and a calibration error of .18 where half the sentences are true). Calibrated as a whole it would
  give an essay about something else .42 in place of .08, by its best of eight sentences: worse as a reward.
- Requests that live from the conversation before them ("continue") have nothing in them that an answer could match.
- Trained on the ChatGPT of 2023 as the one who answers. English.
"""  # noqa: E501 - a table row is a line
