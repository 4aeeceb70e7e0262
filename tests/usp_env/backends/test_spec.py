"""The spec grammar."""

from __future__ import annotations

from pathlib import Path

import pytest

from usp_env.backends.spec import format_options, parse, split_options
from usp_env.errors import SpecError, UnknownNameError, UspError


@pytest.mark.parametrize(
    "text",
    [
        "smollm2-135m",
        "org/name?dtype=bfloat16&temperature=0.5",
        "./folder/model",
        "vllm:org/name?gpu_memory_utilization=0.5",
        "openai:gpt-x@http://localhost:8000/v1?key_env=MY_KEY&max_tokens=64",
        "openai:a@b@http://h:1/v1,https://i/v1?stop=%0A&stop=END&system=be%20brief",
        "m?chat_template_kwargs=%7B%22enable_thinking%22%3A%20false%7D",
    ],
)
def test_the_canonical_form_parses_to_itself(text: str) -> None:
    spec = parse(text)
    assert parse(str(spec)) == spec
    bare, options = split_options(text)
    assert split_options("x" + format_options(options)) == ("x", options)


def test_parts() -> None:
    spec = parse("openai:a@b@http://h:1/v1/,https://i/v1?stop=x&stop=y&temperature=0")
    assert (spec.engine, spec.model, spec.urls) == ("openai", "a@b", ("http://h:1/v1", "https://i/v1"))
    assert spec.sampling().stop == ("x", "y")
    assert spec.sampling().temperature == 0.0


@pytest.mark.parametrize(
    "text",
    ["", " ", "a b", "openai:m", "openai:@http://h/v1", "openai:m@ftp://h", "openai:m@http://user:pw@h/v1", "m?temperature", "m?top_p=0",
     "m?temperature=x", "m?max_tokens=0", "m?temperature=1&temperature=2", "m?key_env=sk-123-abc", "m?chat_template_kwargs=[1]"],
)  # fmt: skip
def test_what_breaks_the_grammar(text: str) -> None:
    with pytest.raises(SpecError):
        parse(text)


def test_an_unknown_option_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'top_p'"):
        parse("m?topp=1")


def test_endpoints(tmp_path: Path) -> None:
    (tmp_path / "usp-env.toml").write_text(
        '[endpoints.two]\nmodel = "m"\nurl = ["http://a/v1", "http://b/v1"]\ntemperature = 0.5\nstop = ["x"]\n'
        '[endpoints.local]\nmodel = "smollm2-135m"\nmax_tokens = 7\n',
        "utf-8",
    )
    assert str(parse("@two?temperature=1", tmp_path)) == "openai:m@http://a/v1,http://b/v1?stop=x&temperature=1.0"
    assert parse("@local", tmp_path).sampling().max_tokens == 7
    with pytest.raises(UnknownNameError, match="did you mean 'two'"):
        parse("@tow", tmp_path)
    with pytest.raises(SpecError, match="no usp-env.toml"):
        parse("@two", tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["[endpoints.x", "endpoints = 3", "[endpoints]\nx = 3", "[endpoints.x]\nmodel = 5",
                                  '[endpoints.x]\nmodel = "m"\nurl = 5', '[endpoints.x]\nmodel = "m"\ntemprature = 1'])  # fmt: skip
def test_bad_endpoint_files_are_project_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "usp-env.toml").write_text(text, "utf-8")
    with pytest.raises(UspError):
        parse("@x", tmp_path)
