"""Cycle consistency by hand, with an embedder of known axes and scripted profiles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from usp_env.backends.scripted import ScriptedBackend
from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError
from usp_env.extraction.generator import ProfileGenerator, ProfileTexts
from usp_env.profiles import Profile
from usp_env.records import RewardTerms
from usp_env.rewards.cycle import CycleConsistency, cycle_consistency

COOK = Profile("a", "You cook.", "You are terse.")
AXES = {
    "You cook.": (1.0, 0.0, 0.0),
    "You are terse.": (0.0, 1.0, 0.0),
    "You bake.": (0.6, 0.8, 0.0),
    "You ramble.": (0.0, -1.0, 0.0),
    "You are brief.": (0.0, 3.0, 4.0),  # longer than 1: a cosine does not care
}


class Axes:
    """Vectors from a table; counts its calls."""

    name = "axes"

    def __init__(self, table: Mapping[str, Sequence[float]] = AXES) -> None:
        self.table, self.calls = table, []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        return np.array([self.table[text] for text in texts])


def talk(*texts: str) -> Dialogue:
    return Dialogue.of({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


@pytest.mark.parametrize(
    ("objective", "subjective", "expected"),
    [
        ("You cook.", "You are terse.", 1.0),  # ½ (1 + 1)
        ("You bake.", "You are terse.", 0.8),  # ½ (.6 + 1)
        ("You bake.", "You are brief.", 0.6),  # ½ (.6 + 3/5)
        ("You cook.", "You ramble.", 0.0),  # ½ (1 − 1)
        ("You are terse.", "You cook.", 0.0),  # the halves are not mixed up: ½ (0 + 0)
        ("You are terse.", "You ramble.", -0.5),  # ½ (0 − 1)
    ],
)
def test_equation_5(objective: str, subjective: str, expected: float) -> None:
    assert cycle_consistency([(COOK, ProfileTexts(objective, subjective))], Axes()) == pytest.approx([expected])


def test_a_batch_is_its_members_and_one_call() -> None:
    embed = Axes()
    pairs = [(COOK, ProfileTexts("You bake.", "You are terse.")), (COOK, ProfileTexts("You cook.", "You ramble."))]
    assert cycle_consistency(pairs, embed).tolist() == [0.8, 0.0]
    assert len(embed.calls) == 1
    assert sorted(embed.calls[0]) == sorted({"You cook.", "You are terse.", "You bake.", "You ramble."})  # each text once
    assert cycle_consistency([], embed).shape == (0,)
    assert len(embed.calls) == 1


def test_noise_of_the_batch_does_not_show() -> None:
    noisy = {text: np.array(vector) + 3e-7 for text, vector in AXES.items()}
    pairs = [(COOK, ProfileTexts("You bake.", "You are brief."))]
    assert cycle_consistency(pairs, Axes(noisy)).tolist() == cycle_consistency(pairs, Axes()).tolist() == [0.6]


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda texts: np.zeros(len(texts)), r"shape \(2, d\), got \(2,\)"),
        (lambda texts: np.ones((3, 4)), r"got \(3, 4\)"),
        (lambda texts: np.zeros((len(texts), 4)), "not zero"),
        (lambda texts: np.full((len(texts), 4), np.nan), "finite"),
        (lambda texts: np.full((len(texts), 4), np.inf), "finite"),
    ],
)
def test_what_an_embedder_returns_is_checked(embed: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        cycle_consistency([(COOK, ProfileTexts(COOK.objective, COOK.subjective))], embed)


def test_the_reward_reads_each_dialogue_once() -> None:
    down = BackendError("down")
    backend = ScriptedBackend(
        ["You bake.\n\nYou are terse.", "I cannot tell.", down, "You cook.\n\nYou are brief.", "I still cannot."]
    )
    embed = Axes()
    reward = CycleConsistency(ProfileGenerator(backend), embed)
    blank = Profile("b", "You cook.", " ")
    dialogues = [talk("bread?", "Yes."), talk("hm"), talk("soup"), talk("stew"), Dialogue(), talk("soup")]
    terms = reward([COOK, COOK, COOK, COOK, COOK, blank], dialogues)
    assert terms == [RewardTerms(dialogue={"cycle": 0.8}), None, down, RewardTerms(dialogue={"cycle": 0.8}), None, None]
    assert (backend.batches, len(embed.calls)) == ([4, 1], 1)
    assert (reward.name, reward.when) == ("cycle", "end")


def test_without_anything_to_score_no_model_is_asked() -> None:
    class Never:
        def generate(self, dialogues: Sequence[Dialogue]) -> list[ProfileTexts | BackendError | None]:
            raise AssertionError(f"asked about {dialogues}")

    embed = Axes()
    reward = CycleConsistency(Never(), embed)
    assert reward([COOK], [Dialogue()]) == [None]
    assert reward([], []) == []
    assert embed.calls == []


def test_a_generator_that_fails_on_everything_raises() -> None:
    class Down:
        def generate(self, dialogues: Sequence[Dialogue]) -> list[ProfileTexts | BackendError | None]:
            raise BackendError("no device")

    with pytest.raises(BackendError, match="no device"):
        CycleConsistency(Down(), Axes())([COOK], [talk("soup?")])


def test_names_stay_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    generator = ProfileGenerator(ScriptedBackend(lambda request: "You bake.\n\nYou are terse."))
    monkeypatch.setattr("usp_env.extraction.generator.load_generator", lambda spec: asked.append(spec) or generator)
    monkeypatch.setattr("usp_env.models.embedders.load", lambda name: asked.append(name) or Axes())
    reward = CycleConsistency()
    assert asked == ["profile-generator", "auto"]  # told when made, not at the first end
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert twin == reward
        assert twin([COOK], [talk("bread?")]) == [RewardTerms(dialogue={"cycle": 0.8})]
    assert CycleConsistency("wangkevin02/Profile_Generator", "minilm").identity["embedder"] == "axes"
    assert asked[-2:] == ["wangkevin02/Profile_Generator", "minilm"]


@pytest.mark.assets
def test_the_real_embedder_prefers_the_person_who_spoke() -> None:
    pytest.importorskip("torch")
    own = Profile("a", "You are a nurse who plans night shifts.", "You write in short fragments without capitals.")
    other = Profile("b", "You trade cryptocurrencies and write bots.", "You write long and formal paragraphs.")
    read = ProfileTexts("You work night shifts as a nurse on a ward.", "You use lower case and short fragments.")
    from usp_env.models import embedders

    right, wrong = cycle_consistency([(own, read), (other, read)], embedders.load("minilm"))
    assert right > 0.6 > 0.4 > wrong


def test_blank_turns_say_nothing() -> None:
    generator = ProfileGenerator(ScriptedBackend(["You cook.\n\nYou are terse."]))
    assert CycleConsistency(generator, Axes())([COOK], [talk(" \n", "Hello?", "")]) == [None]
