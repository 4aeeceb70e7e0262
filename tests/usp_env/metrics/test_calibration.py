"""The gate that judges pass, and their kappa with people."""

from __future__ import annotations

import json

import pytest

from usp_env.backends.base import Request
from usp_env.backends.scripted import ScriptedBackend
from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError, UspError
from usp_env.metrics import calibration as c
from usp_env.metrics.judges import Judge, values

NAN = float("nan")


def dialogue(k: int) -> Dialogue:
    said = [(f"person says number {k}", f"Model says number {k}.") for _ in range(3)]
    return Dialogue.of(
        {"role": role, "content": text} for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)
    )


CASES = c.speaker_cases([dialogue(k) for k in range(20)])


def reply(key: str, value: object) -> str:
    return json.dumps({key: value, "reason": "so"})


def able(request: Request) -> str:
    """Knows both speakers by their words, and rates the packaged anchors as they should be."""
    task = request.messages[-1]["content"]
    lines = task.split("\n---\n")[0].split("\n")
    if '"speaker": "X"' in task:
        return reply("speaker", "user" if "person" in json.loads(lines[-1])["text"] else "assistant")
    return reply("score", 9 if any(word in task for word in ("Canberra", "evens", "Bonjour")) else 1)


def judge(answer=able) -> Judge:
    return Judge(ScriptedBackend(answer))


def test_cases_are_balanced_short_and_seeded() -> None:
    assert [case.role for case in CASES] == ["user", "assistant"] * 10
    assert all(case.messages[-1].role == case.role and 1 <= len(case.messages) <= c.WINDOW for case in CASES)
    talks = [dialogue(k) for k in range(20)]
    assert c.speaker_cases(talks) == CASES != c.speaker_cases(talks, seed=1)
    assert c.speaker_cases([Dialogue.of([{"role": "user", "content": "two words"}])]) == []
    # passed over, not taken for the other role: the roles stay in turn
    one_sided = Dialogue.of([{"role": "user", "content": "three words here"}])
    assert [case.role for case in c.speaker_cases([one_sided] * 3)] == ["user"]


def test_the_question_hides_who_is_who() -> None:
    asked = judge()
    assert values(c.identify(asked, CASES)).tolist() == [1, 0] * 10
    for case, request in zip(CASES, asked.backend.history, strict=True):
        shown = request.messages[-1]["content"].split("\n---\n")[0]
        assert "user" not in shown
        assert "assistant" not in shown
        assert json.loads(shown.split("\n")[0])["speaker"] == "X"
        assert len(shown.split("\n")) == len(case.messages)


def test_an_able_judge_passes() -> None:
    assert c.admit(judge(), CASES) == c.GateReport(1.0, 1.0, 20, 6)
    report = c.admit(judge(), CASES, anchors=())
    assert report.speakers == 1
    assert report.n_anchors == 0


def test_a_judge_that_always_says_the_same_is_refused() -> None:
    def always(request: Request) -> str:
        return reply("speaker", "user") if '"speaker": "X"' in request.messages[-1]["content"] else able(request)

    with pytest.raises(c.JudgeRefusedError, match="50% of 20 speakers"):
        c.admit(judge(always), CASES)
    assert c.admit(judge(always), CASES, gate=0.5).speakers == 0.5
    assert issubclass(c.JudgeRefusedError, UspError)


def test_a_judge_that_likes_everything_is_refused_by_the_anchors() -> None:
    def kind(request: Request) -> str:
        return able(request) if '"speaker": "X"' in request.messages[-1]["content"] else reply("score", 10)

    with pytest.raises(c.JudgeRefusedError, match="50% of 6 anchor"):
        c.admit(judge(kind), CASES)


def test_a_judge_that_gives_no_json_is_refused_and_a_failing_one_is_not() -> None:
    with pytest.raises(c.JudgeRefusedError, match="0% of 20 speakers"):
        c.admit(judge(lambda request: "I think it is the user."), CASES)
    with pytest.raises(BackendError, match="down"):
        c.admit(judge(lambda request: BackendError("down")), CASES)


def test_too_few_cases_or_a_bad_gate() -> None:
    for cases, gate in ((CASES[:9], 0.8), (CASES, 1.2), (CASES, -0.1)):
        with pytest.raises(SpecError, match="gate"):
            c.admit(judge(), cases, gate=gate)


def test_the_packaged_anchors_are_whole_conversations() -> None:
    for anchor in c.ANCHORS:
        assert [m.role for m in anchor.dialogue][:2] == ["user", "assistant"]
        assert anchor.dialogue[-1].role == "assistant"
        assert 1 <= anchor.low < anchor.high <= 10
    assert sum(anchor.low > 5 for anchor in c.ANCHORS) == sum(anchor.high < 5 for anchor in c.ANCHORS) == 3


def test_kappa_by_hand() -> None:
    pytest.importorskip("sklearn")
    # judge 1 1 0 -1, person 1 0 0 -1: p_o = 3/4; p_e = (2·1 + 1·2 + 1·1)/16 = 5/16; kappa = (12 − 5)/(16 − 5)
    assert c.kappa_with_humans([1, 1, 0, -1], [1, 0, 0, -1]) == pytest.approx(7 / 11)
    assert c.kappa_with_humans([1, 1, NAN, 0, -1], [1, 0, 1, 0, -1]) == pytest.approx(7 / 11)
    assert c.kappa_with_humans([1, 1, 1, 0, -1], [1, NAN, 0, 0, -1]) == pytest.approx(7 / 11)
    assert c.kappa_with_humans([1, 2, 3], [1, 2, 3]) == 1
    near, far = c.kappa_with_humans([1, 2, 5], [1, 3, 5], "quadratic"), c.kappa_with_humans([1, 2, 5], [1, 5, 2], "quadratic")
    assert near > far


def test_weighted_kappa_measures_in_scores_of_which_some_were_never_given() -> None:
    pytest.importorskip("sklearn")
    # judge 1 2 5, person 1 5 5: 1 − Σ d(a_i, b_i) / n over Σ d(a_i, b_j) / n²
    # |a − b|: (0 + 3 + 0)/3 over (8 + 7 + 4)/9; squared: (0 + 9 + 0)/3 over (32 + 19 + 16)/9
    assert c.kappa_with_humans([1, 2, 5], [1, 5, 5], "linear") == pytest.approx(1 - 9 / 19)
    assert c.kappa_with_humans([1, 2, 5], [1, 5, 5], "quadratic") == pytest.approx(1 - 27 / 67)
    assert c.kappa_with_humans([9, 9], [9, 9], "quadratic") != c.kappa_with_humans([9, 9], [9, 9], "quadratic")  # NaN


def test_kappa_without_meaning() -> None:
    for a, b in (([], []), ([1, 1], [1, 1]), ([NAN], [1])):
        assert c.kappa_with_humans(a, b) != c.kappa_with_humans(a, b)  # NaN
    with pytest.raises(SpecError, match="whole-number"):
        c.kappa_with_humans([1.5, 2], [1, 2])
    with pytest.raises(SpecError, match="one length"):
        c.kappa_with_humans([1], [1, 2])
