"""Specs of users: options of their own, and what is told where one is wrong."""

from __future__ import annotations

import pytest

from usp_env import users
from usp_env.backends.base import Backend
from usp_env.backends.scripted import ScriptedBackend
from usp_env.backends.spec import ModelSpec
from usp_env.errors import SpecError, UnknownNameError, UspError
from usp_env.users.base import ModelSpeaker


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("", SpecError, "expected a user spec"),
        ("agendo", UnknownNameError, "did you mean 'agenda'"),
        ("userlm", UnknownNameError, "userlm:<model>"),
        ("plato:", SpecError, "model spec"),
        ("agenda:x", SpecError, "'agenda' alone"),
        ("agenda?retries=1", SpecError, "takes no options"),
        ("replay", SpecError, "replay:BANK"),
        ("replay:sharegpt", SpecError, "ships without"),
        ("usp:m?retries=1", UnknownNameError, "retries"),
        ("dialogue:m?system=hi", SpecError, "is for assistants"),
        ("userlm:m?guardrails=lenght", SpecError, "lenght"),
        ("userlm:m?guardrails=", SpecError, "guardrails"),
        ("userlm:m?retries=101", SpecError, "retries"),
        ("userlm:m?retries=1&retries=2", SpecError, "twice"),
        ("duet:m", SpecError, r"GENERATOR\+VERIFIER"),
        ("duet:m+", SpecError, r"GENERATOR\+VERIFIER"),
        ("duet:a+b+c", SpecError, "one plus sign"),
        ("duet:a+b?retries=1", UnknownNameError, "retries"),
        ("duet:a+b?system=x", SpecError, "is for assistants"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec: str, error: type[UspError], said: str) -> None:
    with pytest.raises(error, match=said):
        users.load(spec, lambda model: ScriptedBackend(["never"]))


def test_each_model_of_a_duet_has_its_own_engine_and_options() -> None:
    asked: list[ModelSpec] = []

    def source(spec: ModelSpec) -> Backend:
        asked.append(spec)
        return ScriptedBackend([], spec=str(spec))

    user = users.load("duet:openai:a@http://x/v1?key_env=A&retries=2&max_tokens=5+openai:b@http://y/v1?key_env=B", source)
    assert isinstance(user, ModelSpeaker)
    assert [(s.model, s.urls, s.options["key_env"]) for s in asked] == [
        ("a", ("http://x/v1",), "A"),
        ("b", ("http://y/v1",), "B"),
    ]
    assert "retries" not in asked[0].options
    assert user.sampling.max_tokens == 5
    assert user.spec == "duet:openai:a@http://x/v1?key_env=A&max_tokens=5&retries=2+openai:b@http://y/v1?key_env=B"
    identity = user.backend.identity
    assert (identity["retries"], identity["judge"]["verifier"]["spec"]) == (2, "openai:b@http://y/v1?key_env=B")


def test_a_plus_sign_in_an_option_is_escaped() -> None:
    user = users.load("duet:a?stop=1%2B1+b", lambda spec: ScriptedBackend([]))
    assert isinstance(user, ModelSpeaker)
    assert user.sampling.stop == ("1+1",)
    assert user.spec == "duet:a?stop=1%2B1+b"


def test_an_option_s_value_may_be_quoted() -> None:
    user = users.load("userlm:m?guardrails=repeats%2Clength", lambda spec: ScriptedBackend([]))
    assert user.spec == "userlm:m?guardrails=length,repeats"
