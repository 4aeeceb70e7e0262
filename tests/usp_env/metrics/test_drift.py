"""Per-turn consistency, its curve and its slope."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from usp_env.errors import BackendError, SpecError
from usp_env.metrics import drift
from usp_env.metrics.consistency import DialogueTurns, ProfileText, r_dp_p

COOK = ProfileText("You cook in Lyon. You sew.")


class Cooks:
    """Explains turns that say cook, supports turns that were said before."""

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> np.ndarray:
        return np.array([float("cook" in turn) for turn in turns])

    def supported(self, turns: Sequence[Sequence[str]], facts: Sequence[str]) -> np.ndarray:
        return np.array([float(fact in own) for own, fact in zip(turns, facts, strict=True)])


def test_a_contradiction_at_turn_six_shows_at_turn_six() -> None:
    talk = DialogueTurns(("i cook",) * 5 + ("i never set foot in a kitchen",))
    steady = DialogueTurns(("i cook",) * 6)
    values = drift.prompt_to_line([COOK, COOK], [talk, steady], Cooks())
    assert values.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    curve = drift.turn_curve(values)
    assert curve.mean.tolist() == [1, 1, 1, 1, 1, 0.5]
    assert int(np.argmin(np.diff(values[0]))) + 2 == 6  # the turn after the largest fall
    # slope over x = 0..5, mean 2.5: Σ dx·y = −2.5 (without the last 2.5), Σ dx² = 17.5
    assert drift.slope(values).tolist() == pytest.approx([-2.5 / 17.5, 0.0])


def test_rows_mean_is_r_dp_p() -> None:
    talks = [DialogueTurns(("i cook", "rain", " ")), DialogueTurns(("cook",))]
    values = drift.prompt_to_line([COOK, COOK], talks, Cooks())
    np.testing.assert_array_equal(values, [[1, 0, np.nan], [1, np.nan, np.nan]])
    assert [np.nanmean(row) for row in values] == r_dp_p([COOK, COOK], talks, Cooks()).tolist()


def test_line_to_line_is_one_minus_the_worst_pair() -> None:
    asked: list[tuple[str, str]] = []

    def contradicts(earlier: Sequence[str], later: Sequence[str]) -> np.ndarray:
        asked.extend(zip(earlier, later, strict=True))
        return np.array([0.25 * abs(len(b) - len(a)) for a, b in zip(earlier, later, strict=True)])

    talks = [DialogueTurns(("a", "bbb", "ccccc")), DialogueTurns(("x",)), DialogueTurns(())]
    values = drift.line_to_line(talks, contradicts)
    # turn 2: 1 − .5; turn 3: against a 1 − 1, against bbb 1 − .5 -> 0
    np.testing.assert_array_equal(values, [[np.nan, 0.5, 0.0], [np.nan] * 3, [np.nan] * 3])
    assert asked == [("a", "bbb"), ("a", "ccccc"), ("bbb", "ccccc")]  # never across dialogues, never backwards


def test_line_to_line_passes_over_blank_turns_and_checks_its_model() -> None:
    values = drift.line_to_line([DialogueTurns((" ", "a", "", "b"))], lambda a, b: np.full(len(a), 0.25))
    np.testing.assert_array_equal(values, [[np.nan, np.nan, np.nan, 0.75]])
    with pytest.raises(SpecError, match="contradicts"):
        drift.line_to_line([DialogueTurns(("a", "b"))], lambda a, b: np.array([2.0]))


def test_line_support_asks_with_what_was_said_before() -> None:
    values = drift.line_support([DialogueTurns(("a", "b", "a")), DialogueTurns((" ", "b", "b"))], Cooks())
    np.testing.assert_array_equal(values, [[np.nan, 0, 1], [np.nan, np.nan, 1]])
    assert drift.line_support([DialogueTurns(("a",))], Cooks()).shape == (1, 1)


def ask(facts: Sequence[str]) -> list[str | None]:
    return [None if "sew" in fact else f"{fact}?" for fact in facts]


def equal(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    return np.array([float(x == y) for x, y in zip(a, b, strict=True)])


def test_questions_and_answers_by_hand() -> None:
    profiles = [ProfileText("You cook. You swim. You sew."), ProfileText("You sew."), ProfileText("")]
    seen = []

    def answer(people: Sequence[int], questions: Sequence[str], attempt: int) -> list[str | None]:
        seen.append((list(people), list(questions), attempt))
        return ["You cook.", "You ski." if attempt == 0 else "You surf."]

    facts = drift.qa_consistency(profiles, ask, answer, equal)
    np.testing.assert_array_equal(facts, [0.5, np.nan, np.nan])
    assert seen == [([0, 0], ["You cook.?", "You swim.?"], 0)]
    again = drift.qa_consistency(profiles, ask, answer, equal, against="again")
    np.testing.assert_array_equal(again, [0.5, np.nan, np.nan])  # cook twice the same, ski against surf
    assert [attempt for _, _, attempt in seen[1:]] == [0, 1]


def test_answers_that_failed_are_left_out_and_errors_pass_through() -> None:
    got = drift.qa_consistency(
        [ProfileText("You cook. You swim.")], ask, lambda people, questions, attempt: [None, "You swim."], equal
    )
    assert got.tolist() == [1.0]
    none = drift.qa_consistency([ProfileText("You cook.")], ask, lambda people, questions, attempt: [None], equal)
    assert np.isnan(none).all()

    def down(people: Sequence[int], questions: Sequence[str], attempt: int) -> list[str]:
        raise BackendError("down")

    with pytest.raises(BackendError, match="down"):
        drift.qa_consistency([ProfileText("You cook.")], ask, down, equal)
    with pytest.raises(SpecError, match="against"):
        drift.qa_consistency([], ask, down, equal, against="both")
    with pytest.raises(SpecError, match="question"):
        drift.qa_consistency([ProfileText("You cook.")], lambda facts: [], down, equal)
    assert drift.qa_consistency([], ask, down, equal).shape == (0,)


def test_slopes_by_hand() -> None:
    values = np.array([[0, 1, 2, np.nan], [1, np.nan, 0, np.nan], [1, 1, 1, 1], [5, np.nan, np.nan, np.nan], [np.nan] * 4])
    # row 1: fall of 1 over 2 turns
    np.testing.assert_allclose(drift.slope(values), [1.0, -0.5, 0.0, np.nan, np.nan], atol=1e-15)
    assert drift.slope(np.zeros((0, 0))).shape == (0,)
    np.testing.assert_array_equal(drift.slope(np.zeros((2, 0))), [np.nan, np.nan])
    for wrong in (np.zeros(3), np.zeros((1, 2, 3))):
        with pytest.raises(SpecError, match="shape"):
            drift.slope(wrong)


def test_slope_agrees_with_numpys_fit() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((5, 7))
    expected = [np.polyfit(np.arange(7), row, 1)[0] for row in values]
    assert drift.slope(values).tolist() == pytest.approx(expected)


def test_the_curve_counts_who_is_still_there() -> None:
    curve = drift.turn_curve(drift.pad([[1.0, 0.0], [0.0], [], [1.0, 1.0, np.nan]]))
    np.testing.assert_array_equal(curve.mean, [2 / 3, 0.5, np.nan])
    assert curve.dialogues.tolist() == [3, 2, 0]
    assert drift.pad([]).shape == (0, 0)


@pytest.mark.assets
def test_the_packaged_verifier_sees_a_user_that_leaves_its_profile_at_turn_six() -> None:
    pytest.importorskip("torch")
    from usp_env.models import scorers

    profile = ProfileText(
        "You run a small bakery in Lyon and want to sell your sourdough bread online. You ask how to price a loaf, how to ship "
        "bread, which web shop to use, how to photograph bread and how to write to customers."
    )
    said = (
        "how should i price a loaf of sourdough?",
        "how do i ship bread to customers",
        "which web shop is best for a small bakery in lyon",
        "tips to photograph my bread?",
        "write an email to my bakery customers about the online shop",
    )
    talks = [
        DialogueTurns((*said, "i am a lawyer in texas and i have never baked, help me sue my landlord")),
        DialogueTurns((*said, "make the email about my sourdough bread shorter")),
    ]
    values = drift.prompt_to_line([profile, profile], talks, scorers.load("facts-v1"))
    assert int(np.argmin(np.diff(values[0]))) + 2 == 6
    assert values[0, 5] < values[0, :5].min()
    assert values[0, 5] < values[1, 5]
    assert drift.slope(values)[0] < drift.slope(values)[1]
