"""Early stop and its companions, termination, copying, leakage, role drift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError, UnknownNameError
from usp_env.metrics import continuity as c
from usp_env.metrics.consistency import DialogueTurns, ProfileText

NAN = float("nan")


def talk(*turns: str) -> DialogueTurns:
    return DialogueTurns(turns)


def dialogue(*lines: str) -> Dialogue:
    return Dialogue.of({"role": ("user", "assistant")[k % 2], "content": line} for k, line in enumerate(lines))


COOK = ProfileText("You are a cook in Lyon. You ask how to clean leeks for a soup. You sew.")


def test_early_stop_looks_at_three_turns_in_a_row_anywhere() -> None:
    talks = [
        talk("tell me more", "Tell me more", "tell me more!", "and now rice?"),  # in the middle
        talk("soup?", "thanks", "thank you", "ok ty"),  # at the end
        talk("tell me more", "tell me more", "rice?", "tell me more"),  # never three in a row
        talk("thanks", "thanks"),
        talk("rice?", "thanks for that, now how many cups of water do i need for four hungry people", "thanks", "cheers"),
        talk(" "),
    ]
    np.testing.assert_array_equal(c.early_stopped(talks), [1, 1, 0, 0, 0, NAN])


def test_the_thresholds_of_early_stop_are_arguments() -> None:
    near = talk("tell me more about rice", "tell me more about beans", "tell me more about okra")
    assert c.early_stopped([near], ratio=0.9).tolist() == [0]
    assert c.early_stopped([near], ratio=0.7).tolist() == [1]
    wordy = talk(*(f"thanks a lot for the part number {k} of it all my dear {k * 'x'}" for k in (1, 20, 60)))
    assert c.early_stopped([wordy]).tolist() == [0]
    assert c.early_stopped([wordy], max_words=14).tolist() == [1]


def test_companions_of_early_stop() -> None:
    talks = [talk("a"), talk("a", "b", "c"), talk()]
    assert c.user_turns(talks).tolist() == [1, 3, 0]
    assert c.ended_by_user(["user_ended", "gratitude_loop", "turn_limit", "infra"]).tolist() == [1, 0, 0, 0]
    assert c.turn_count_distance(talks[:2], talks[:2]) == 0
    assert c.turn_count_distance([talk("a")] * 3, [talk(*"abc")]) == 2
    assert np.isnan(c.turn_count_distance([], [talk("a")]))


@pytest.mark.parametrize("value", ["completed", "infra_failure", "max_turns", ""])
def test_what_is_no_end_reason_is_not_counted_as_not_ended(value: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown end reason '{value}'"):
        c.ended_by_user(["user_ended", value])


def test_termination_by_hand() -> None:
    actual = [[False, False, True], [True], [False, False]]
    predicted = [[False, True, True], [False], [False, True]]
    counts = c.termination_counts(predicted, actual)
    assert counts.tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    # TP 1, FP 2, FN 1: precision 1/3, recall 1/2, F1 = 2/(2 + 2 + 1)
    assert tuple(c.termination(counts)) == pytest.approx((1 / 3, 1 / 2, 0.4))
    swapped = c.termination(c.termination_counts(actual, predicted))
    assert (swapped.precision, swapped.recall) == pytest.approx((1 / 2, 1 / 3))


def test_termination_of_users_that_never_or_always_end() -> None:
    actual = [[False, False, True]]
    never, always = c.termination_counts([[False] * 3], actual), c.termination_counts([[True] * 3], actual)
    np.testing.assert_array_equal(tuple(c.termination(never)), (NAN, 0, 0))
    assert tuple(c.termination(always)) == pytest.approx((1 / 3, 1, 0.5))
    assert tuple(c.termination(c.termination_counts(actual, actual))) == (1, 1, 1)
    np.testing.assert_array_equal(tuple(c.termination(c.termination_counts([], []))), (NAN, NAN, NAN))
    with pytest.raises(SpecError, match="as many"):
        c.termination_counts([[True]], [[True, False]])


def test_copying_the_profile() -> None:
    talks = [
        talk("You are a cook in Lyon."),
        talk("i AM a cook, in lyon!!"),  # the first person, and punctuation between
        talk("i am a cook in lyon", "soup for four people please now"),  # 3 of 3 + 3 grams
        talk("pls help me clean leeks"),
        talk("soup", "thanks a lot"),  # no turn of four words
        talk(),
    ]
    got = c.copied_from_profile(talks, [COOK] * 6)
    np.testing.assert_allclose(got, [1, 1, 0.5, 0, NAN, NAN])
    assert np.isnan(c.copied_from_profile([talk("a b c d")], [ProfileText("")])).all()


def test_copying_the_last_reply_not_an_earlier_one() -> None:
    copied = dialogue("soup?", "chop two leeks and boil", "chop two leeks and boil")
    late = dialogue("soup?", "chop two leeks and boil", "ok", "add some salt", "chop two leeks and boil")
    first = dialogue("chop two leeks and boil", "chop two leeks and boil")
    np.testing.assert_array_equal(c.copied_from_assistant([copied, late, first, dialogue()]), [1, 0, NAN, NAN])


def test_the_profile_does_not_count_as_the_assistants_words_and_the_other_way_round() -> None:
    conversation = dialogue("soup?", "chop two leeks and boil", "chop two leeks and boil")
    assert c.copied_from_profile([DialogueTurns.of(conversation)], [COOK]).tolist() == [0]


def test_leakage_is_the_share_of_sentences_said_verbatim() -> None:
    talks = [
        talk("You are a cook in Lyon", "you ask HOW to clean leeks, for a soup"),
        talk("so you are a cook in lyon and"),
        talk("i am a cook in lyon"),  # said in the first person it is copied, not leaked
        talk("you are a cook", "in lyon"),  # over two turns
        talk(""),
    ]
    np.testing.assert_allclose(c.leakage(talks, [COOK] * 5), [1, 0.5, 0, 0, NAN])
    assert np.isnan(c.leakage([talk("you sew")], [ProfileText("You sew.")])).all()
    assert c.leakage([talk("you sew")], [ProfileText("You sew.")], least=2).tolist() == [1]
    assert c.leakage([talk("you are a cook in lyons")], [ProfileText("You are a cook in Lyon.")]).tolist() == [0]


def test_role_drift_by_hand() -> None:
    calls = []

    def human(texts: Sequence[str]) -> np.ndarray:
        calls.append(list(texts))
        return np.array([0.2 if "assist" in text else 0.9 for text in texts])

    talks = [
        talk("hi", "let me assist you"),
        talk("Certainly! Here it is.", "ok thanks", " ", "Assistant: yes"),
        talk(" "),
        talk(),
    ]
    np.testing.assert_allclose(c.role_drift(talks, human), [0.5, 2 / 3, NAN, NAN])
    assert calls == [["hi", "let me assist you", "Certainly! Here it is.", "ok thanks", "Assistant: yes"]]
    assert c.role_drift(talks[:1], human, threshold=0.95).tolist() == [1]
    assert c.role_drift(talks[:1], human, threshold=0.2).tolist() == [0]  # at the threshold is a person
    assert np.isnan(c.role_drift([talk()], human)).all()
    with pytest.raises(SpecError, match="human"):
        c.role_drift([talk("a")], lambda texts: np.array([2.0]))


@pytest.mark.parametrize(
    ("text", "assistant"),
    [
        ("Of course! Here’s the revised version", True),
        ("As an AI language model, I cannot", True),
        ("I'm sorry, but I can't do that.", True),
        ("Here are some ideas:", True),
        ("You're welcome!", True),
        ("I’d be happy to help!", True),
        ("ok", False),
        ("thanks, great answer", False),
        ("sure why not", False),
        ("I'm sorry to hear that", False),
        ("here is my code", False),
        ("i want you to act as an AI language model", False),
        ("Great! Now make it shorter", False),
        ("", False),
    ],
)
def test_assistants_openers(text: str, assistant: bool) -> None:
    assert c.sounds_like_assistant(text) is assistant


def test_the_packaged_detector_catches_a_user_that_talks_like_an_assistant() -> None:
    pytest.importorskip("safetensors")
    from usp_env.models import scorers

    person = talk("how do i get wine out of a shirt", "ok and if its silk?", "thx that helped")
    helper = talk(
        "Wine stains can be removed in several ways. Here are some common methods you can consider:\n1. Blot the stain.",
        "It is important to note that silk is a delicate fabric. Therefore, it is recommended to consult a professional cleaner.",
    )
    got = c.role_drift([person, helper], scorers.load("human-v1"))
    assert got.tolist() == [0, 1]


def test_a_parrot_is_caught() -> None:
    parrot = talk("I am a cook in Lyon.", "I ask how to clean leeks for a soup.")
    person = talk("hey, my leeks are full of sand. what do i do?", "and do they go in whole?")
    assert c.copied_from_profile([parrot, person], [COOK] * 2).tolist() == [1, 0]
