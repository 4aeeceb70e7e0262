"""UserLM: the intent as system message, true roles, the reply generated under a *user* header.

Naous et al. 2025 (arXiv 2510.06552), `microsoft/UserLM-8b`. The model reads one paragraph that tells what the user wants
("You are a user who wants …"): the profile's objective facts. It can open, and ends a conversation with
`<|endconversation|>`, which the renderer finds in its tokenizer. Sampling is that of the model card.

The guardrails are those that the authors use to simulate tasks, off unless asked for:

| `guardrails=` | refuses a draft that                                                        |
|---------------|-----------------------------------------------------------------------------|
| `first`       | begins with "I", "You" or "Here", the first tokens that the authors ban     |
| `length`      | has fewer than 3 or more than 25 words                                      |
| `repeats`     | says an earlier user turn, the intent or a sentence of the intent again     |

`guardrails=all` is all three. Banning a first token and redrawing drafts that begin with it give the same distribution.
An utterance that ends the conversation is never refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from usp_env.backends.base import Backend, Generation, Request, Sampling
from usp_env.dialogue import View
from usp_env.users.base import profile_of
from usp_env.users.redraw import RETRIES, Judge, RedrawingBackend, Steps, Verdict

SAMPLING = Sampling(temperature=1.0, top_p=0.8, max_tokens=96)
GUARDRAILS = ("first", "length", "repeats")
MIN_WORDS, MAX_WORDS = 3, 25
_FIRST = re.compile(r"\s*(I|You|Here)\b")


def render(view: View) -> list[dict[str, str]]:
    """The messages a UserLM model reads."""
    intent = profile_of(view, "a UserLM user").objective
    return [{"role": "system", "content": intent}, *(message.chat() for message in view.messages)]


def guardrails(text: str) -> str:
    """The option's value: names joined by commas, in the table's order.

    Raises:
        ValueError: A name that is no guardrail.

    Example:
        >>> guardrails("all"), guardrails("repeats,first")
        ('first,length,repeats', 'first,repeats')
    """
    names = set(GUARDRAILS if text == "all" else text.split(","))
    if unknown := names.difference(GUARDRAILS):
        raise ValueError(f"expected all, or some of {', '.join(GUARDRAILS)}, got {', '.join(sorted(unknown))}")
    return ",".join(name for name in GUARDRAILS if name in names)


def guarded(backend: Backend, guardrails: str = "", retries: int = RETRIES) -> Backend:
    """A backend behind the named guardrails; itself without any."""
    if not guardrails:
        return backend
    return RedrawingBackend(backend, _judge(guardrails.split(",")), retries, lambda: {"guardrails": guardrails})


def objection(text: str, intent: str, earlier: Sequence[str], rails: Sequence[str]) -> str | None:
    """The first guardrail that refuses a draft, or None.

    Args:
        text: The draft.
        intent: What the system message says.
        earlier: The user's earlier turns.
        rails: Names of guardrails.

    Example:
        >>> objection("I want to bake bread", "You bake.", [], GUARDRAILS), objection("ok", "You bake.", [], ["length"])
        ('first', 'length')
    """
    if "first" in rails and _FIRST.match(text):
        return "first"
    if "length" in rails and not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
        return "length"
    said = [*earlier, intent, *re.split(r"(?<=[.!?])\s+", intent)]
    if "repeats" in rails and _plain(text) in map(_plain, said):
        return "repeats"
    return None


def _judge(rails: Sequence[str]) -> Judge:
    def judge(requests: Sequence[Request], drafts: Sequence[Generation]) -> Steps:
        yield from ()  # rules ask no engine
        return [Verdict(_of(request, draft, rails)) for request, draft in zip(requests, drafts, strict=True)]

    return judge


def _of(request: Request, draft: Generation, rails: Sequence[str]) -> str | None:
    if draft.finish_reason == "end":
        return None
    intent, *messages = request.messages or ()
    return objection(draft.text, intent["content"], [m["content"] for m in messages if m["role"] == "user"], rails)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!?")
