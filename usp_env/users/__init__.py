"""Simulated users, named by a spec: `load("usp-mini")`, `load("roleplay:openai:gpt@https://…?temperature=0.7")`.

| spec                          | what                                                                                 |
|-------------------------------|--------------------------------------------------------------------------------------|
| `usp-mini`, `usp-mini-sft`    | the packaged USP user: SmolLM2-135M after conditional SFT                            |
| `usp:<model>`                 | any model under USP's template (profile in the system message, user header)          |
| `plato-mini`, `plato:<model>` | PlatoLM: the same without a profile; `plato-mini` is the packaged one              |
| `userlm:<model>`              | UserLM: the objective facts are its intent; may stand behind guardrails              |
| `roleplay:<model>`            | an assistant model plays the user                                                    |
| `dialogue:<model>`            | an assistant model plays the user from the dialogue alone                            |
| `duet:<generator>+<verifier>` | role-play whose drafts a second model judges                                         |
| `agenda`                      | makes the profile's requests one by one, by rules                                    |
| `replay:<bank>`               | says the real user's own turns                                                       |
| `human`                       | a person at the terminal                                                             |
| `scripted[:<file>]`           | follows a script                                                                     |

Options besides the model's: `guardrails=all` (or some of `first,length,repeats`) of `userlm`, and `retries=3` of `userlm` and
`duet`. The two models of a duet have options of their own, and `retries` is one of the generator's:
`duet:smollm2-135m?retries=2&max_tokens=64+@judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote_plus

from usp_env.backends import load as load_backend
from usp_env.backends.base import Backend, Sampling
from usp_env.backends.spec import ModelSpec, parse
from usp_env.dialogue import Role, View
from usp_env.errors import SpecError, UnknownNameError
from usp_env.users import dialogue, duet, plato, roleplay, userlm, usp
from usp_env.users.agenda import AgendaSpeaker
from usp_env.users.base import ModelSpeaker, Partner
from usp_env.users.human import HumanSpeaker
from usp_env.users.replay import ReplaySpeaker
from usp_env.users.scripted import ScriptedSpeaker

Source = Callable[[ModelSpec], Backend]


@dataclass(frozen=True)
class Kind:
    """How a kind of user asks its model.

    Args:
        render: A view as messages.
        sampling: Defaults of the spec's sampling options.
        header: Whose header the reply is generated under. Models of users (`"user"`) may end the conversation.
        options: Options of this kind besides the model's, and what types them.
    """

    render: Callable[[View], list[dict[str, str]]]
    sampling: Sampling
    header: Role
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)


def _retries(text: str) -> int:
    if not 0 <= (value := int(text)) <= 100:
        raise ValueError("not in [0, 100]")
    return value


def _human(rest: str) -> HumanSpeaker:
    if rest:
        raise SpecError(f"user 'human:{rest}': a person has no model; write human")
    return HumanSpeaker("user")


ALIASES = {"usp-mini": "usp:usp-mini-sft", "usp-mini-sft": "usp:usp-mini-sft", "plato-mini": "plato:plato-mini"}
KINDS = {
    "usp": Kind(usp.render, usp.SAMPLING, "user"),
    "plato": Kind(plato.render, plato.SAMPLING, "user"),
    "userlm": Kind(userlm.render, userlm.SAMPLING, "user", {"guardrails": userlm.guardrails, "retries": _retries}),
    "roleplay": Kind(roleplay.render, roleplay.SAMPLING, "assistant"),
    "dialogue": Kind(dialogue.render, dialogue.SAMPLING, "assistant"),
    "duet": Kind(duet.render, duet.SAMPLING, "assistant", {"retries": _retries}),
}
"""Users that ask a model."""
RULES: Mapping[str, Callable[[str], Partner]] = {
    "agenda": AgendaSpeaker.load,
    "replay": ReplaySpeaker.load,
    "scripted": lambda rest: ScriptedSpeaker.load(rest or None, "user"),
    "human": _human,
}
"""Users that ask none."""
_FORMS = (*ALIASES, *(f"{name}:<model>" for name in KINDS), "agenda", "replay:<bank>", "human", "scripted", "scripted:<file>")


def load(spec: str, source: Source = load_backend) -> Partner:
    """The simulated user that a spec names.

    Args:
        spec: See the module's table; the model part is `usp_env.backends.spec`'s grammar.
        source: Gives the backend of a model spec, e.g. one behind `usp_env.backends.load_cached`.

    Raises:
        UnknownNameError: No such kind of user, or an unknown option.
        SpecError: The spec breaks the grammar, or a bank has nothing to replay.
        MissingAssetError: Weights, or a file, have to be fetched first.
    """
    if not isinstance(spec, str) or not spec:
        raise SpecError(f"expected a user spec such as 'usp-mini' or 'roleplay:MODEL', got {spec!r}")
    bare, mark, query = spec.partition("?")
    kind, colon, rest = ALIASES.get(bare, bare).partition(":")
    if kind in RULES:
        if mark:
            raise SpecError(f"user {spec!r}: {kind!r} takes no options")
        return RULES[kind](rest)
    if kind not in KINDS or not colon:
        raise UnknownNameError("user", bare, _FORMS)
    return _model_user(kind, rest + mark + query, source)


def _model_user(name: str, text: str, source: Source) -> ModelSpeaker:
    kind = KINDS[name]
    model, verifier = duet.split(text) if name == "duet" else (text, "")
    model, own = take_options(model, kind.options)
    parsed = _parse(model, name)
    spec = f"{name}:{replace(parsed, options={**parsed.options, **own})}"
    if verifier:
        judge = _parse(verifier, name)
        spec = f"{spec}+{judge}"
        backend: Backend = duet.verified(source(parsed), source(judge), judge, **own)
    elif name == "userlm":
        backend = userlm.guarded(source(parsed), **own)
    else:
        backend = source(parsed)
    return ModelSpeaker(
        backend=backend,
        role="user",
        spec=spec,
        render=kind.render,
        header=kind.header,
        sampling=parsed.sampling(kind.sampling),
        adapter=parsed.options.get("adapter"),
        can_end=kind.header == "user",
        chat_template_kwargs=tuple(parsed.options.get("chat_template_kwargs", {}).items()),
        prices=None if verifier and judge.prices != parsed.prices else parsed.prices,  # two prices: the cost is not known
    )


def _parse(model: str, kind: str) -> ModelSpec:
    parsed = parse(model)
    if "system" in parsed.options:
        raise SpecError(
            f"user '{kind}:{parsed}': the system message of a simulated user is its profile; 'system' is for assistants"
        )
    return parsed


def take_options(text: str, known: Mapping[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """A model spec without the options in `known`, and those, typed.

    Raises:
        SpecError: A value that does not fit, or an option given twice.

    Example:
        >>> take_options("smollm2-135m?retries=2&temperature=1", {"retries": int})
        ('smollm2-135m?temperature=1', {'retries': 2})
    """
    bare, _, query = text.partition("?")
    kept: list[str] = []
    taken: dict[str, Any] = {}
    for pair in query.split("&") if query else []:
        key, _, value = pair.partition("=")
        if key not in known:
            kept.append(pair)
            continue
        if key in taken:
            raise SpecError(f"spec {text!r}: option {key!r} is given twice")
        try:
            taken[key] = known[key](unquote_plus(value))
        except ValueError as error:
            raise SpecError(f"spec {text!r}: option {key!r} has the value {value!r}, which does not fit ({error})") from error
    return bare + ("?" + "&".join(kept) if kept else ""), taken
