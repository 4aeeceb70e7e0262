"""GoalProgress by hand, with a scorer that answers from a table; then the real scorer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from doubles import Speaker

from usp_env.dialogue import Dialogue
from usp_env.env import DialogueEnv
from usp_env.errors import SpecError, UnknownNameError
from usp_env.profiles import Profile, combine
from usp_env.rewards.base import make_reward
from usp_env.rewards.goal import (
    Calibration,
    GoalProgress,
    SimilarityScorer,
    candidates,
    details_of,
    load_scorer,
    overlap,
    sentences,
)
from usp_env.sampling.base import UniformSampler


class Table:
    """p and raised from tables of (text, request); 0 and False elsewhere."""

    name = "table"

    def __init__(self, answers: dict[tuple[str, str], float], raises: set[tuple[str, str]]) -> None:
        self.answers, self.raises = answers, raises
        self.seen: list[tuple[str, str]] = []

    def __call__(self, sentences: Sequence[str], requests: Sequence[str]) -> np.ndarray:
        self.seen += zip(sentences, requests, strict=True)
        return np.array([self.answers.get(pair, 0.0) for pair in zip(sentences, requests, strict=True)])

    def raised(self, utterances: Sequence[str], requests: Sequence[str]) -> np.ndarray:
        return np.array([pair in self.raises for pair in zip(utterances, requests, strict=True)], dtype=bool)


def person(*details: str, objective: str = "You cook.") -> Profile:
    facts = {"objective_facts": {"scenarios": [{"goals_or_plans": "g", "task_details": list(details)}]}}
    return Profile("a", objective, "You are terse.", facts if details else None)


def talk(*texts: str) -> Dialogue:
    return Dialogue.of({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


def phi(scorer: Any, profile: Profile, *texts: str) -> float:
    (terms,) = GoalProgress(scorer)([profile], [talk(*texts)])
    assert terms is not None
    assert list(terms.dialogue) == ["goal"]
    return terms.value


# ── Φ ────────────────────────────────────────────────────────────────────────────────────────────

TALK = ("ask one", "Partly. Wholly wrong.", "ask two", "Now in full. And two.", "bye", "Bye.")
SCORER = Table(
    {("Partly.", "one"): 0.3, ("Now in full.", "one"): 0.9, ("And two.", "two"): 0.6, ("Bye.", "one"): 0.1},
    {("ask one", "one"), ("ask two", "two")},
)


def test_phi_is_the_mean_of_the_best_answers() -> None:
    profile = person("one", "two", "three")  # three is never raised
    assert phi(SCORER, profile, *TALK[:1]) == 0.0
    assert phi(SCORER, profile, *TALK[:2]) == pytest.approx(0.3 / 3)
    assert phi(SCORER, profile, *TALK[:3]) == pytest.approx(0.3 / 3)
    assert phi(SCORER, profile, *TALK[:4]) == pytest.approx((0.9 + 0.6) / 3)
    assert phi(SCORER, profile, *TALK) == pytest.approx((0.9 + 0.6) / 3)  # a worse answer later takes nothing away


def test_a_detail_counts_from_the_turn_that_raises_it() -> None:
    scorer = Table({("Second!", "two"): 1.0}, {("ask two", "two"), ("again", "two")})
    assert phi(scorer, person("two"), "ask one", "Second!", "ask two", "Hm.") == 0.0  # before: not asked for yet
    assert phi(scorer, person("two"), "ask one", "Hm.", "ask two", "Second!") == 1.0
    assert phi(scorer, person("two"), "ask one", "Hm.", "ask two", "Hm.", "more", "Second!") == 1.0  # at any later time
    assert phi(scorer, person("two"), "ask two", "Second!", "again", "Hm.") == 1.0  # the first such turn, not the last
    assert scorer.seen == [
        (s, "two") for s in ("Hm.", "Second!", "Hm.", "Second!", "Second!", "Hm.")
    ]  # nothing else was looked at


def test_at_most_eight_sentences_of_a_reply() -> None:
    scorer = Table({("Right.", "one"): 1.0}, {("ask one", "one")})
    filler = " ".join(f"Filler number {i}." for i in range(7))
    assert phi(scorer, person("one"), "ask one", f"{filler} Right.") == 1.0
    assert phi(scorer, person("one"), "ask one", f"{filler} One more. Right.") == 0.0
    copied = "Ask one. " * 3  # copies are no part of the eight
    assert phi(scorer, person("one"), "ask one", f"{copied}{filler} Right.") == 1.0


def test_copies_of_user_turns_answer_nothing() -> None:
    question = "What is the capital of France and why?"
    scorer = Table(dict.fromkeys([(question, "one"), ("It is Paris.", "one")], 1.0), {(question, "one")})
    assert phi(scorer, person("one"), question, question) == 0.0
    assert phi(scorer, person("one"), question, "It is Paris.") == 1.0
    # The user's quoting it afterwards makes no copy of it.
    assert phi(scorer, person("one"), question, "It is Paris.", "It is Paris.", "Yes.") == 1.0


def test_overlap_by_hand() -> None:
    said = ("one two three four five", "six seven")
    assert overlap("One, two, three FOUR!", said) == 1.0
    assert overlap("one two three four nine", said) == 0.5  # 1 of 2 4-grams
    assert candidates("one two three four nine", said) == ("one two three four nine",)  # not above .5
    assert overlap("one two three four five nine", said) == pytest.approx(2 / 3)
    assert candidates("one two three four five nine", said) == ()
    assert overlap("four five six seven", said) == 0.0  # across two turns
    assert overlap("two three", said) == 1.0  # a short sentence is one n-gram
    assert overlap("three two", said) == 0.0
    assert overlap("?!", said) == overlap("one", ()) == 0.0


def test_sentences() -> None:
    assert sentences("1. First. Second?\n\n* Third (v1.2)!  \n---\n## Head\n") == ["First.", "Second?", "Third (v1.2)!", "Head"]
    assert sentences("Run:\n```py\na = 1. \nb = 2\n```\nDone.") == ["Run:", "```py\na = 1. \nb = 2\n```", "Done."]
    assert sentences("open ```x. y") == ["open", "```x. y"]
    assert sentences("你好。再见。") == ["你好。", "再见。"]
    assert sentences(" \n...\n") == []


def test_an_environment_pays_the_differences(sampler: UniformSampler) -> None:
    turns = TALK[::2]
    user = Speaker(lambda view, seed: turns[len(view.messages) // 2])
    env = DialogueEnv(user, sampler, GoalProgress(SCORER), population="uniform", max_turns=3)
    env.reset(seed=0, options={"profile": person("one", "two", "three")})
    paid = [env.step(text)[1] for text in TALK[1::2]]
    assert paid == pytest.approx([0.3 / 3, (0.6 + 0.6) / 3, 0.0])
    assert sum(paid) == pytest.approx(1.5 / 3)  # the return is the last Φ


# ── details ──────────────────────────────────────────────────────────────────────────────────────


def test_details() -> None:
    assert details_of(person("one", " ", "two")) == ("one", "two")
    assert details_of(person(objective="You cook. You want a recipe.")) == ("You cook.", "You want a recipe.")
    virtual = combine(person("one"), replace(person("other"), id="b"))
    assert details_of(virtual) == ("one",)


def test_no_details_no_score() -> None:
    nobody, somebody = person(objective=" "), person("one")
    terms = GoalProgress(SCORER)([nobody, somebody], [talk(*TALK)] * 2)
    assert terms[0] is None
    assert terms[1] is not None
    assert terms[1].value == 0.9
    assert GoalProgress(SCORER)([], []) == []


def test_dialogues_are_scored_as_if_alone() -> None:
    profiles = [person("one"), person("two", "one"), person("three")]
    talks = [talk(*TALK[:2]), talk(*TALK), talk()]
    together = [terms and terms.value for terms in GoalProgress(SCORER)(profiles, talks)]
    assert together == [0.3, pytest.approx(0.75), 0.0]


@pytest.mark.parametrize("wrong", [[1.5], [-0.1], [float("nan")], [0.5, 0.5], 0.5])
def test_a_scorer_that_breaks_its_contract_is_named(wrong: object) -> None:
    class Odd(Table):
        name = "odd"

        def __call__(self, sentences: Sequence[str], requests: Sequence[str]) -> Any:
            return wrong

    with pytest.raises(SpecError, match=r"goal scorer 'odd': expected 1 values in \[0, 1\]"):
        phi(Odd({}, {("ask one", "one")}), person("one"), "ask one", "Partly.")


def test_unknown_scorer() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'minilm-v0'"):
        GoalProgress("minilm-v1")


# ── similarity ───────────────────────────────────────────────────────────────────────────────────


class Plane:
    """Texts are angles in degrees."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_similarity_by_hand() -> None:
    scorer = SimilarityScorer("plane", Plane(), Calibration(zero=0.2, one=0.8, raised=0.5))
    # cos 0, 60, 90, 180 = 1, .5, 0, −1
    assert scorer(["0", "60", "90", "180"], ["0"] * 4) == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert list(scorer.raised(["60", "61"], ["0", "0"])) == [True, False]
    assert scorer([], []).shape == (0,)


def test_each_text_is_embedded_once() -> None:
    embedder = Plane()
    scorer = SimilarityScorer("plane", embedder, Calibration(0.0, 1.0, 0.5), cache_size=3)
    scorer(["0", "60", "0"], ["60", "0", "0"])
    assert embedder.calls == [["0", "60"]]
    scorer(["60", "90"], ["0", "0"])
    assert embedder.calls[1:] == [["90"]]
    assert scorer(["1", "2", "3", "4"], ["0"] * 4).shape == (4,)  # more texts than the cache holds
    scorer(["4"], ["2"])
    assert embedder.calls[2:] == [["1", "2", "3", "4"], ["2"]]  # 3, 4 and 0 were the last


def test_small_noise_of_an_embedder_does_not_show() -> None:
    noise = iter((0.0, 1e-6, -1e-6))

    def embed(texts: Sequence[str]) -> np.ndarray:
        return Plane()(texts) + next(noise)

    values = {SimilarityScorer("plane", embed, Calibration(0.0, 1.0, 0.5))(["50"], ["0"])[0] for _ in range(3)}
    assert values == {0.643}  # cos 50° = .64279


def test_a_reward_by_name_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usp_env.rewards.goal.load_scorer", lambda name: SCORER)
    for twin in (copy.deepcopy(GoalProgress()), pickle.loads(pickle.dumps(GoalProgress("minilm-v0")))):
        assert twin([person("one")], [talk(*TALK)])[0].value == 0.9


# ── the real scorer ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def minilm() -> SimilarityScorer:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    scorer = load_scorer("minilm-v0")
    assert isinstance(scorer, SimilarityScorer)
    return scorer


QUESTION = "How can I keep basil fresh for a week?"
ANSWER = "Keep the basil in a glass of water, loosely covered, at room temperature."
UNRELATED = (
    "The stock market closed lower on Friday.",
    "Use a left join to keep the rows without a match.",
    "Sure, I can help you with that!",
)


@pytest.mark.assets
def test_an_answer_is_told_from_what_is_unrelated(minilm: SimilarityScorer) -> None:
    detail = "Ask how to keep basil fresh for a week"
    p = minilm([ANSWER, *UNRELATED], [detail] * 4)
    assert p[0] > 0.5
    assert list(p[1:]) == [0.0, 0.0, 0.0]
    assert list(minilm.raised([QUESTION, "Write a poem about the sea."], [detail] * 2)) == [True, False]


@pytest.mark.assets
def test_goal_by_name(minilm: SimilarityScorer) -> None:
    reward = make_reward("goal", "assistant")
    assert reward is not None
    assert reward.when == "turn"
    profile = person("Ask how to keep basil fresh for a week", "Ask for a poem about the sea")
    replies = {"answer": ANSWER, "unrelated": " ".join(UNRELATED), "echo": QUESTION}
    terms = reward([profile] * 3, [talk(QUESTION, reply) for reply in replies.values()])
    values = dict(zip(replies, (t.value for t in terms if t is not None), strict=True))
    assert 0.25 < values["answer"] <= 0.5  # one of two details
    assert max(values["unrelated"], values["echo"]) < 0.05


@pytest.mark.assets
def test_one_dialogue_scores_as_in_a_batch(minilm: SimilarityScorer) -> None:
    profile = person("Ask how to keep basil fresh for a week")
    talks = [talk(QUESTION, f"{ANSWER} {'And so on. ' * n}") for n in range(8)]
    batch = [t and t.value for t in GoalProgress(minilm)([profile] * 8, talks)]
    fresh = SimilarityScorer("again", minilm._embedder, minilm.calibration)
    assert [t and t.value for d in talks for t in GoalProgress(fresh)([profile], [d])] == batch


@pytest.mark.assets
def test_the_shipped_calibration_is_in_order(minilm: SimilarityScorer) -> None:
    calibration = minilm.calibration
    assert 0 < calibration.zero < calibration.raised < calibration.one < 1
