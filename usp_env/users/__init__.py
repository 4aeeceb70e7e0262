"""Simulated users, named by a spec: `load("usp-mini")`, `load("roleplay:openai:gpt@https://…?temperature=0.7")`.

| spec                     | what                                                                                |
|--------------------------|-------------------------------------------------------------------------------------|
| `usp-mini`               | the packaged USP user; until trained weights ship, SmolLM2-135M under USP's template |
| `usp:<model>`            | any model under USP's template (profile in the system message, user header)          |
| `roleplay:<model>`       | an assistant model plays the user                                                    |
| `scripted[:<file>]`      | follows a script                                                                     |
"""

from __future__ import annotations

from collections.abc import Callable

from usp_env.backends import load as load_backend
from usp_env.backends.base import Backend
from usp_env.backends.spec import ModelSpec, format_options, parse, split_options
from usp_env.errors import SpecError, UnknownNameError
from usp_env.users import roleplay, usp
from usp_env.users.base import ModelSpeaker, Partner
from usp_env.users.scripted import ScriptedSpeaker

ALIASES = {"usp-mini": "usp:smollm2-135m"}
KINDS = {"usp": usp, "roleplay": roleplay}


def load(spec: str, source: Callable[[ModelSpec], Backend] = load_backend) -> Partner:
    """The simulated user that a spec names.

    Args:
        spec: See the module's table; the model part is `usp_env.backends.spec`'s grammar.
        source: Gives the backend of a model spec, e.g. one behind `usp_env.backends.load_cached`.

    Raises:
        UnknownNameError: No such kind of user, or an unknown option.
        SpecError: The spec breaks the grammar.
        MissingAssetError: Weights have to be fetched first.
    """
    if not isinstance(spec, str) or not spec:
        raise SpecError(f"expected a user spec such as 'usp-mini' or 'roleplay:MODEL', got {spec!r}")
    bare, options = split_options(spec)
    if bare == "scripted" or bare.startswith("scripted:"):
        if options:
            raise SpecError(f"user {spec!r}: a scripted user takes no options")
        return ScriptedSpeaker.load(bare.partition(":")[2] or None, "user")
    kind, colon, model = ALIASES.get(bare, bare).partition(":")
    if kind not in KINDS or not colon:
        raise UnknownNameError("user", bare, [*ALIASES, *(f"{name}:<model>" for name in KINDS), "scripted", "scripted:<file>"])
    if "system" in options:
        raise SpecError(f"user {spec!r}: the system message of a simulated user is its profile; 'system' is for assistants")
    parsed = parse(model + format_options(options))
    return ModelSpeaker(
        backend=source(parsed),
        role="user",
        spec=f"{kind}:{parsed}",
        render=KINDS[kind].render,
        header="user" if kind == "usp" else "assistant",
        sampling=parsed.sampling(KINDS[kind].SAMPLING),
        adapter=parsed.options.get("adapter"),
        can_end=kind == "usp",
        chat_template_kwargs=tuple(parsed.options.get("chat_template_kwargs", {}).items()),
    )
