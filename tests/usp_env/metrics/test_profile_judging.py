"""SC.Score and Val.Score."""

from __future__ import annotations

import json

import numpy as np
import pytest

from usp_env.backends.scripted import ScriptedBackend
from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError
from usp_env.metrics.judges import Judge, values
from usp_env.metrics.profile_judging import SC, VAL, sc_score, val_score
from usp_env.profiles import Profile

TALK = Dialogue.of([{"role": "user", "content": "soup. 4 people."}, {"role": "assistant", "content": "Leeks."}])
TERSE = Profile("a", "You cook in Lyon.", "You are terse.")


def verdict(score: float) -> str:
    return json.dumps({"score": score, "reason": "so"})


@pytest.mark.parametrize(("score", "prompt"), [(sc_score, SC), (val_score, VAL)])
def test_what_is_asked(score, prompt: str) -> None:
    judge = Judge(ScriptedBackend([verdict(4)]))
    assert score(judge, [TERSE], [TALK])[0].value == 4
    data, asked = judge.backend.history[0].messages[-1]["content"].split("\n---\n")
    assert asked == prompt
    assert [json.loads(line) for line in data.split("\n")] == [
        {"description": "You are terse."},
        {"speaker": "user", "text": "soup. 4 people."},
        {"speaker": "assistant", "text": "Leeks."},
    ]
    assert "Lyon" not in data  # the objective facts are Fact.Con's business
    assert judge.backend.history[0].json_schema["properties"]["score"] == {"type": "number", "minimum": 1, "maximum": 5}


def test_the_guidelines_that_are_known_are_in_the_prompts() -> None:
    assert "Infer from context" in SC
    assert "does not sound like a human being" in SC
    assert SC != VAL


def test_the_scale_ends_at_five() -> None:
    judge = Judge(ScriptedBackend([verdict(6), verdict(0), verdict(5)]))
    got = sc_score(judge, [TERSE], [TALK])[0]
    assert (got.value, got.retried) == (5, 2)
    assert "from 1 to 5" in judge.backend.history[1].messages[-1]["content"]


def test_nothing_to_judge_bad_answers_and_failures_are_nan() -> None:
    silent = Dialogue.of([{"role": "assistant", "content": "Hello?"}])
    blank = Profile("b", "You cook.", " ")
    judge = Judge(ScriptedBackend([verdict(3), BackendError("down"), "no", "no"]), retries=1)
    profiles, talks = [TERSE, TERSE, blank, TERSE, TERSE], [TALK, silent, TALK, TALK, TALK]
    got = val_score(judge, profiles, talks)
    np.testing.assert_array_equal(values(got), [3, np.nan, np.nan, np.nan, np.nan])
    assert [bool(v.error) for v in got] == [False, False, False, True, False]
    assert got[1].complaint == got[2].complaint == "nothing to ask"
    assert judge.backend.batches == [3, 1]


def test_one_profile_for_each_dialogue() -> None:
    with pytest.raises(SpecError, match="one profile"):
        sc_score(Judge(ScriptedBackend([])), [TERSE], [])
