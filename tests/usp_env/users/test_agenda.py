"""The agenda: its stack through whole conversations, its utterances, what it takes for an answer."""

from __future__ import annotations

import pytest

from usp_env.dialogue import Dialogue, Message
from usp_env.errors import UspError
from usp_env.profiles import Profile
from usp_env.records import Reply
from usp_env.users.agenda import THANKS, AgendaSpeaker, unmet, utterance

DETAILS = ["Ask for a soup recipe", "Ask how long it keeps", "Ask how long it keeps", "Write a rhyme about leeks"]
COOK = Profile(
    "a", "You cook.", "Terse.", {"objective_facts": {"scenarios": [{"task_details": d} for d in (DETAILS[:1], DETAILS[1:])]}}
)
ANSWER, REFUSAL, QUESTION = "Boil the leeks.", "I'm sorry, I can't help with that.", "For how many people?"


def say(dialogue: Dialogue) -> Reply:
    return AgendaSpeaker().respond([dialogue.view_for("user", COOK)], [0])[0]


def talk(*answers: str, opening: str | None = None) -> tuple[list[str], bool]:
    """What the user says when it gets these answers, and whether it ended."""
    dialogue = Dialogue() if opening is None else Dialogue((Message("user", opening),))
    ended = False
    for answer in (*answers, None):
        if not dialogue.messages or dialogue[-1].role == "assistant":
            reply = say(dialogue)
            dialogue, ended = dialogue.add(Message("user", reply.text)), reply.ended
        if answer is not None:
            dialogue = dialogue.add(Message("assistant", answer))
    return dialogue.utterances("user"), ended


SOUP, KEEPS, RHYME = "Can you give me a soup recipe?", "Can you tell me how long it keeps?", "Write a rhyme about leeks."


def test_each_request_in_turn_then_thanks() -> None:
    assert talk(ANSWER, ANSWER, ANSWER, ANSWER) == ([SOUP, KEEPS, KEEPS, RHYME, THANKS], True)
    assert talk() == ([SOUP], False)


@pytest.mark.parametrize("unhelpful", [REFUSAL, QUESTION, " "])
def test_what_is_not_answered_is_said_once_more(unhelpful: str) -> None:
    again = "Let me say it again: "
    assert talk(unhelpful, ANSWER) == ([SOUP, again + SOUP, KEEPS], False)
    assert talk(unhelpful, unhelpful, unhelpful) == ([SOUP, again + SOUP, KEEPS, again + KEEPS], False)


def test_a_known_bad_assistant_is_left_in_the_end() -> None:
    said, ended = talk(*["I am not able to help with that."] * 8)
    assert (len(said), said[-1], ended) == (9, THANKS, True)


def test_a_given_opening_changes_nothing() -> None:
    assert talk("Hello!", ANSWER, opening="hi") == (["hi", SOUP, KEEPS], False)
    assert talk(ANSWER, opening=SOUP) == ([SOUP, KEEPS], False)


@pytest.mark.parametrize(
    ("detail", "said"),
    [
        ("Ask to shorten it", "Please shorten it."),
        ("Tell it to continue", "Please continue."),
        ("Asked for adjectives", "Can you give me adjectives?"),
        ("Request a lab", "Can you give me a lab?"),
        ("Request that it be short", "I would like that it be short."),
        ("Ask the model for a list", "Can you give me a list?"),
        ("Asked it whether leeks grow", "Can you tell me whether leeks grow?"),
        ("How to read JSON", "Can you tell me how to read JSON?"),
        ("what is JSON?", "What is JSON?"),
        ("Report that the preview is gray", "The preview is gray."),
        ("act as a poet", "Act as a poet."),
        (" . ", "."),
    ],
)
def test_notes_become_utterances(detail: str, said: str) -> None:
    assert utterance(detail) == said


@pytest.mark.parametrize(
    ("reply", "missing"),
    [
        ("I can’t do that.", True),
        ("Sorry, no.", True),
        ("As an AI, I have no soup.", True),
        ("You cannot freeze it, but it keeps for a week.", False),
        ("word " * 40 + "anything else?", False),
        ("word " * 38 + "which?", True),
        ("Boil. " * 60 + "I cannot say more.", False),
    ],
)
def test_what_counts_as_an_answer(reply: str, missing: bool) -> None:
    assert unmet(reply) is missing


def test_a_profile_without_requests_is_refused() -> None:
    with pytest.raises(UspError, match="task_details"):
        AgendaSpeaker().respond([Dialogue().view_for("user", Profile("x", "You cook.", "Terse."))], [0])
