"""UserLM: its guardrails by hand, its end token, its template."""

from __future__ import annotations

import pytest

from usp_env import users
from usp_env.backends.base import Generation
from usp_env.backends.scripted import ScriptedBackend
from usp_env.dialogue import END, Dialogue
from usp_env.profiles import Profile
from usp_env.users.userlm import GUARDRAILS, objection

INTENT = "You are a cook who wants a soup. The soup has no onions."
COOK = Profile("a", INTENT, "You are terse.")
TALK = Dialogue.of([{"role": "user", "content": "Got a soup recipe?"}, {"role": "assistant", "content": "Leek soup."}])
# As in the model's repository: one line break, no begin token, and a user header always stands at the end.
TEMPLATE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>user<|end_header_id|>' }}"
)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I need a soup", "first"),
        (" You there, soup please", "first"),
        ("Here's my question about soup", "first"),
        ("I'd like soup now", "first"),
        ("Imagine a soup now", None),
        ("what do I need", None),
        ("Your soup is cold", None),
        ("i need a soup", None),
        ("soup please", "length"),
        ("soup please now", None),
        (" ".join(["soup"] * 25), None),
        (" ".join(["soup"] * 26), "length"),
        ("", "length"),
        ("got a  SOUP recipe", "repeats"),
        ("the soup has no onions!", "repeats"),
        ("does the soup have no onions?", None),
    ],
)
def test_guardrails_by_hand(text: str, refused: str | None) -> None:
    assert objection(text, INTENT, ["Got a soup recipe?"], GUARDRAILS) == refused
    if refused:
        assert objection(text, INTENT, ["Got a soup recipe?"], [r for r in GUARDRAILS if r != refused]) is None


def ask(lines: list[str | Generation], options: str) -> tuple[str, bool, ScriptedBackend]:
    backend = ScriptedBackend(lines)
    reply = users.load(f"userlm:m{options}", lambda spec: backend).respond([TALK.view_for("user", COOK)], [3])[0]
    return reply.text, reply.ended, backend


def test_without_guardrails_anything_goes() -> None:
    text, ended, backend = ask(["I"], "")
    assert (text, ended, backend.batches) == ("I", False, [1])


def test_the_intent_is_the_system_message_and_the_style_is_hidden() -> None:
    _, _, backend = ask(["ok"], "")
    assert backend.history[0].messages == [{"role": "system", "content": INTENT}, *(m.chat() for m in TALK)]


def test_guardrails_redraw_and_give_up_after_the_retries() -> None:
    text, _, backend = ask(["I want it", "soup", "got a soup recipe?", "what about leeks then"], "?guardrails=all")
    assert (text, backend.batches) == ("what about leeks then", [1] * 4)
    text, _, backend = ask(["I want it", "soup", "never"], "?guardrails=all&retries=1")
    assert (text, backend.batches) == ("soup", [1, 1])
    text, _, backend = ask(["I want it"], "?guardrails=length")
    assert (text, backend.batches) == ("I want it", [1])


@pytest.mark.parametrize("text", ["", "Thanks!"])
def test_an_ending_is_never_refused(text: str) -> None:
    assert ask([Generation(text, finish_reason="end")], "?guardrails=all")[:2] == (text, True)


@pytest.mark.assets
def test_its_template_and_end_token_are_found() -> None:
    transformers = pytest.importorskip("transformers")
    from usp_env.models import assets
    from usp_env.rendering import Renderer

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(assets.path("smollm2-135m")))
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", END]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = TEMPLATE
    renderer = Renderer(tokenizer)
    assert [renderer.end_of_turn_id, renderer.end_of_conversation_id] == tokenizer.convert_tokens_to_ids(marks[2:])
    messages = [{"role": "system", "content": INTENT}, *(m.chat() for m in TALK)]
    row = tokenizer.decode(renderer.render(messages, generation_role="user").token_ids)
    assert row == tokenizer.apply_chat_template(messages, tokenize=False)  # the line break is the model's to say
