"""P(human) of each user utterance, from a table."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError
from usp_env.profiles import Profile
from usp_env.rewards.human_likeness import HumanLikeness

PERSON = Profile("a", "You cook.", "You are terse.")


class Table:
    """P(human) by text; counts its calls."""

    name = "table"

    def __init__(self, **values: float) -> None:
        self.values, self.calls = values, []

    def __call__(self, texts: Sequence[str]) -> list[float]:
        self.calls.append(list(texts))
        return [self.values[text] for text in texts]


def talk(*texts: str) -> Dialogue:
    return Dialogue.of({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


def test_a_vector_over_the_users_utterances_alone() -> None:
    scorer = Table(hi=1.0, more=0.5, bye=0.3)
    (terms,) = HumanLikeness(scorer)([PERSON], [talk("hi", "Certainly!", "more", "Of course!", "bye")])
    assert terms is not None
    assert terms.utterance["human"].tolist() == [1.0, 0.5, 0.3]
    assert terms.dialogue == {}
    assert terms.value == pytest.approx(0.6)  # (1 + .5 + .3) / 3


def test_one_call_for_a_batch() -> None:
    scorer = Table(hi=1.0, more=0.5, bye=0.3)
    terms = HumanLikeness(scorer)([PERSON] * 3, [talk("bye"), Dialogue(), talk("hi", "x", "more")])
    assert [row and row.utterance["human"].tolist() for row in terms] == [[0.3], None, [1.0, 0.5]]
    assert scorer.calls == [["bye", "hi", "more"]]
    assert HumanLikeness(scorer)([PERSON], [Dialogue()]) == [None]
    assert len(scorer.calls) == 1  # nobody said anything


@pytest.mark.parametrize("wrong", [[0.5, 0.5], [[0.5]], [1.01], [-0.01], [np.nan]])
def test_what_a_scorer_returns_is_checked(wrong: Any) -> None:
    with pytest.raises(SpecError, match=r"reward 'human': expected a scorer that gives 1 values in \[0, 1\]"):
        HumanLikeness(lambda texts: np.array(wrong))([PERSON], [talk("hi")])


def test_a_failed_scorer_is_a_failed_scorer() -> None:
    def down(texts: Sequence[str]) -> np.ndarray:
        raise BackendError("down")

    with pytest.raises(BackendError, match="down"):
        HumanLikeness(down)([PERSON], [talk("hi")])


def test_names_stay_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("usp_env.models.scorers.load", lambda name: asked.append(name) or Table(hi=1.0))
    reward = HumanLikeness()
    assert asked == ["human-v1"]  # told when made, not at the first end
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert twin == reward
        assert twin([PERSON], [talk("hi")])[0].value == 1.0
    assert HumanLikeness("human-v1-twin").identity == {"scorer": "table"}
    assert asked[-1] == "human-v1-twin"
