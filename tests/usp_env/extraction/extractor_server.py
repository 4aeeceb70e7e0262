"""What a good extractor answers, as a pure function of the request, and answers that are broken in known ways."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "backends"))

from faulty_server import Action, Seen, answer, digest  # noqa: E402

from usp_env.data.conversations import Conversation  # noqa: E402
from usp_env.dialogue import Dialogue  # noqa: E402
from usp_env.extraction import prompts, schema  # noqa: E402

WORDS = "bread violins tomatoes chess trains maps soap bees kites lenses rope ink".split()


def talk(i: int) -> list[dict[str, str]]:
    thing = f"{WORDS[i % 12]}-{i}"
    return [
        {"role": "user", "content": f"how do i sell {thing} as a trader?"},
        {"role": "assistant", "content": f"As a retired admiral of Norway I would open a stall for {thing}. " * 20},
        {"role": "user", "content": "ok and the price"},
        {"role": "assistant", "content": "About 5 dollars."},
    ]


def conversation(i: int, **more: Any) -> Conversation:
    return Conversation(f"c{i}", Dialogue.of(talk(i)), **more)


def call_of(body: Mapping[str, Any]) -> str:
    system, user = (message["content"] for message in body["messages"])
    if system == prompts.POLISH_SYSTEM:
        return "polish"
    return next(n for n in ("facts", "scenarios", "traits") if getattr(prompts, n.upper()) in user)


def good(body: Mapping[str, Any]) -> str:
    prompt = body["messages"][-1]["content"]
    call = call_of(body)
    thing = (re.findall(r"\w+-\d+", prompt) or ["?"])[0]
    if call == "polish":
        return json.dumps(
            {
                "objective": f"You are a small trader who wants to sell {thing} at a fair price in a stall of your own.",
                "subjective": f"You write short lower case questions about {thing} without any greeting and seldom a question mark.",
            }
        )
    if call == "facts":
        empty: dict[str, list[str]] = {key: [] for key in (*schema.FACTS, schema.STYLE)}
        trade = [f"Likely a trader of {thing}, as evidenced by asking how to sell {thing}"]
        style = ["Lower case questions, as evidenced by 'ok and the price'"]
        return json.dumps(empty | {"occupation": trade, "age": ["Not mentioned"], "language_style": style})
    if call == "scenarios":
        return json.dumps({"scenarios": [{"goals_or_plans": f"Sell {thing}", "task_details": [f"Ask how to sell {thing}"]}]})
    none = {"score": "Inconclusive", "conclusion": None, "reason": None}
    calm = {"score": "Low", "conclusion": "The user is a calm person", "reason": "Plain requests"}
    return json.dumps(dict.fromkeys(schema.TRAITS, none) | {"Neuroticism": calm})


def broken(body: Mapping[str, Any], kind: int) -> str:
    text = good(body)
    if call_of(body) == "polish" and kind == 3:
        return text.replace("You are", "The user is")
    return [text[: len(text) // 2], f"```json\n{text}\n```", json.dumps({**json.loads(text), "mood": []}), "[]"][kind]


def breaks(seen: Seen, share: float) -> int | None:
    """The kind of breakage of a request, drawn from its own hash."""
    draw = int(digest(seen.body, "broken")[:12], 16) / 16**12
    return int(draw / share * 4) if draw < share else None


def says(text: str, **choice: Any) -> Action:
    role = {"role": "assistant", "content": text}
    return answer(Seen("/v1/chat/completions", {}, {}, 0), message=role, **choice)


def extractor(share: float = 0.0, delay: float = 0.0) -> Callable[[Seen], Action]:
    def respond(seen: Seen) -> Action:
        kind = breaks(seen, share) if share else None
        made = says(good(seen.body) if kind is None else broken(seen.body, kind))
        return Action(made.body, delay=delay)

    return respond
