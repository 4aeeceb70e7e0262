"""Prompt-to-line consistency, from a table of (profile, utterance)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.profiles import Profile
from usp_env.rewards.consistency import PromptToLine

COOK, SEWER = Profile("a", "You cook.", "You are terse."), Profile("b", "You sew.", "You ramble.")
FITS = {
    ("You cook.\n\nYou are terse.", "soup?"): 0.9,
    ("You cook.\n\nYou are terse.", "thread?"): 0.1,
    ("You sew.\n\nYou ramble.", "soup?"): 0.2,
    ("You sew.\n\nYou ramble.", "thread?"): 0.8,
}


class Table:
    """p(the profile supports the turn); counts its calls."""

    name = "table"

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> list[float]:
        self.calls.append(list(zip(profiles, turns, strict=True)))
        return [FITS[pair] for pair in self.calls[-1]]


def talk(*texts: str) -> Dialogue:
    return Dialogue.of({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


def test_each_line_against_its_own_profile_in_one_call() -> None:
    verifier = Table()
    reward = PromptToLine(verifier)
    dialogues = [talk("soup?", "Yes.", "thread?"), talk("thread?", "soup?"), Dialogue(), talk("soup?")]
    terms = reward([COOK, SEWER, COOK, SEWER], dialogues)
    assert [row and row.utterance["consistency"].tolist() for row in terms] == [[0.9, 0.1], [0.8], None, [0.2]]
    assert terms[0].value == pytest.approx(0.5)  # the mean over the lines: (.9 + .1) / 2
    assert len(verifier.calls) == 1
    assert (reward.name, reward.when) == ("consistency", "end")


def test_without_a_profile_it_is_not_scorable() -> None:
    verifier = Table()
    assert PromptToLine(verifier)([Profile("c", "", " ")], [talk("soup?")]) == [None]
    assert verifier.calls == []


@pytest.mark.parametrize("wrong", [[0.5, 0.5], [1.5]])
def test_what_a_verifier_returns_is_checked(wrong: Any) -> None:
    verifier = Table()
    verifier.explains = lambda profiles, turns: np.array(wrong)  # type: ignore[method-assign]
    with pytest.raises(SpecError, match="reward 'consistency'"):
        PromptToLine(verifier)([COOK], [talk("soup?")])


def test_names_stay_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("usp_env.models.scorers.load", lambda name: asked.append(name) or Table())
    reward = PromptToLine()
    assert asked == ["facts-v1"]  # told when made, not at the first end
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert twin == reward
        assert twin([COOK], [talk("soup?")])[0].value == 0.9
    assert reward.identity == {"verifier": "table"}
