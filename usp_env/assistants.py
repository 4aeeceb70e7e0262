"""Assistants, named by a spec: `load("smollm2-135m")`, `load("openai:gpt@https://…")`, `load("echo")`.

| spec                | what                                                              |
|---------------------|-------------------------------------------------------------------|
| `<model>`           | a chat model, see `usp_env.backends.spec`; `?system=…` instructs it |
| `echo`              | repeats the user: a reward that it can win is broken               |
| `known-bad`         | never helps: the lower anchor of any ranking                       |
| `human`             | a person at the terminal                                          |
| `scripted[:<file>]` | follows a script                                                  |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from usp_env.backends import load as load_backend
from usp_env.backends.base import Backend, Sampling
from usp_env.backends.spec import ModelSpec, parse, split_options
from usp_env.dialogue import Role, View
from usp_env.errors import SpecError
from usp_env.records import Reply
from usp_env.users.base import ModelSpeaker, Partner
from usp_env.users.human import HumanSpeaker
from usp_env.users.scripted import ScriptedSpeaker

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=160)
REFUSAL = "I am not able to help with that."


@dataclass(frozen=True)
class RuleAssistant:
    """An assistant without a model: a function of the user's last utterance."""

    spec: str
    answer: Callable[[str], str]
    role: Role = "assistant"

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """One answer per view."""
        return [Reply(self.answer(view.messages[-1].content if view.messages else "")) for view in views]


def load(spec: str, source: Callable[[ModelSpec], Backend] = load_backend) -> Partner:
    """The assistant that a spec names.

    Args:
        spec: See the module's table.
        source: Gives the backend of a model spec, e.g. one behind `usp_env.backends.load_cached`.

    Raises:
        SpecError: The spec breaks the grammar.
        UnknownNameError: An unknown option or endpoint.
        MissingAssetError: Weights have to be fetched first.
    """
    if not isinstance(spec, str) or not spec:
        raise SpecError(f"expected an assistant spec such as 'smollm2-135m' or 'echo', got {spec!r}")
    bare, options = split_options(spec)
    if bare in ("echo", "known-bad", "human", "scripted") or bare.startswith("scripted:"):
        if options:
            raise SpecError(f"assistant {spec!r}: {bare!r} takes no options")
        if bare == "echo":
            return RuleAssistant("echo", str)
        if bare == "human":
            return HumanSpeaker("assistant")
        if bare == "known-bad":
            return RuleAssistant("known-bad", lambda said: REFUSAL)
        return ScriptedSpeaker.load(bare.partition(":")[2] or None, "assistant")
    parsed = parse(spec)
    system = parsed.options.get("system")

    def render(view: View) -> list[dict[str, str]]:
        head = [{"role": "system", "content": system}] if system else []
        return head + [message.chat() for message in view.messages]

    return ModelSpeaker(
        backend=source(parsed),
        role="assistant",
        spec=str(parsed),
        render=render,
        header="assistant",
        sampling=parsed.sampling(SAMPLING),
        adapter=parsed.options.get("adapter"),
        chat_template_kwargs=tuple(parsed.options.get("chat_template_kwargs", {}).items()),
        prices=parsed.prices,
    )
