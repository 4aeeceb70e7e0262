"""DuetSim: what the verifier is asked, and what its answer does."""

from __future__ import annotations

import pytest

from usp_env import users
from usp_env.backends.base import Generation
from usp_env.backends.scripted import ScriptedBackend
from usp_env.backends.spec import ModelSpec
from usp_env.dialogue import Dialogue, View
from usp_env.errors import BackendError
from usp_env.profiles import Profile
from usp_env.records import Reply

COOK = Profile("a", "You cook leeks.", "You are terse.")
TALK = Dialogue.of([{"role": "user", "content": "soup?"}, {"role": "assistant", "content": "Leek soup."}])
VIEW = TALK.view_for("user", COOK)


def ask(
    drafts: list[str], answers: list[str | Generation | BackendError], views: list[View], options: str = ""
) -> tuple[list[Reply], ScriptedBackend, ScriptedBackend]:
    generator, verifier = ScriptedBackend(drafts), ScriptedBackend(answers)

    def source(spec: ModelSpec) -> ScriptedBackend:
        return verifier if spec.model == "v" else generator

    user = users.load(f"duet:g{options}+v", source)
    return user.respond(views, list(range(len(views)))), generator, verifier


def test_a_verifier_that_refuses_k_drafts_makes_k_plus_one() -> None:
    replies, generator, verifier = ask(["a", "b", "c"], ["No.", " **no**, it is wrong", "Yes"], [VIEW])
    assert replies[0].text == "c"
    assert (len(generator.history), len(verifier.history)) == (3, 3)
    assert isinstance(replies[0].generation, Generation)
    assert replies[0].generation.notes == {"objections": ["refused", "refused"], "taken": True}


def test_the_last_draft_is_said_when_the_retries_are_spent() -> None:
    replies, generator, _ = ask(["a", "b"], ["no", "no"], [VIEW], "?retries=1")
    assert (replies[0].text, len(generator.history)) == ("b", 2)


@pytest.mark.parametrize("answer", ["Yes", "hm", "", "Not sure, maybe", "nothing wrong with it"])
def test_only_a_clear_no_refuses(answer: str) -> None:
    replies, generator, _ = ask(["a"], [answer], [VIEW])
    assert (replies[0].text, len(generator.history)) == ("a", 1)


def test_a_blank_draft_is_refused_unasked() -> None:
    replies, _, verifier = ask([" ", "a"], ["yes"], [VIEW])
    assert (replies[0].text, len(verifier.history)) == ("a", 1)


def test_one_call_of_each_model_a_round_for_all_open_rows() -> None:
    _, generator, verifier = ask(["a", "b", "c", "d", "e"], ["no", "yes", "no", "yes", "yes"], [VIEW] * 3)
    assert (generator.batches, verifier.batches) == ([3, 2], [3, 2])


def test_the_verifier_sees_instruction_conversation_and_draft() -> None:
    _, _, verifier = ask([" with cream? "], ["yes"], [VIEW])
    request = verifier.history[0]
    assert request.messages is not None
    (message,) = request.messages
    for part in ("You cook leeks.\n\nYou are terse.", "Person: soup?\n\nAI assistant: Leek soup.\n\n", "\n\nwith cream?\n\n"):
        assert part in message["content"]
    assert "What will you say" not in message["content"]
    assert (request.sampling.temperature, request.sampling.max_tokens, request.role) == (0.0, 8, "assistant")
    _, _, verifier = ask(["hi"], ["yes"], [Dialogue().view_for("user", COOK)])
    assert "(nothing yet)" in (verifier.history[0].messages or [{}])[0]["content"]


def test_a_failed_verdict_fails_its_row_alone() -> None:
    replies, _, _ = ask(["a", "b"], [BackendError("down"), "yes"], [VIEW] * 2)
    assert (str(replies[0].error), replies[0].text) == ("down", "")
    assert (replies[1].error, replies[1].text) == (None, "b")


def test_a_verifier_whose_context_is_full_consents_to_nothing_and_the_notes_say_so() -> None:
    full = Generation("", finish_reason="context_limit", usage={"prompt_tokens": 5000})
    replies, generator, _ = ask(["a", "b"], ["no", full], [VIEW])
    assert (replies[0].text, len(generator.history)) == ("b", 2)
    assert isinstance(replies[0].generation, Generation)
    assert replies[0].generation.notes == {"objections": ["refused"], "taken": True, "unjudged": True}
    replies, generator, _ = ask(["a"], [full], [VIEW])
    assert isinstance(replies[0].generation, Generation)
    assert replies[0].generation.notes == {"unjudged": True}
