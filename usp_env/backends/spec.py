"""The spec grammar: one string names a model, where it runs and how it samples.

    smollm2-135m                              a packaged model
    org/name  or  a path                      a Hugging Face id or a local folder
    vllm:<id>                                 vLLM in this process
    openai:<model>@<url>[,<url>…]             any OpenAI-compatible server; several urls are balanced
    @name                                     [endpoints.name] of ./usp-env.toml
    …?temperature=0.7&max_tokens=64           options, on any of them

`parse` makes a typed `ModelSpec`; `str(spec)` is the canonical form that transcripts record. A key is never
part of a spec: `key_env` is the NAME of the environment variable that holds it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, urlsplit

from usp_env.backends.base import Sampling
from usp_env.errors import SpecError, UnknownNameError
from usp_env.files import read_text

Engine = Literal["hf", "vllm", "openai"]
TOML = "usp-env.toml"


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _number(low: float, high: float, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(f"not in [{low}, {high}]")
        return value

    return convert


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("expected the NAME of an environment variable, never the key itself")
    return text


SAMPLING: dict[str, Callable[[str], Any]] = {
    "temperature": _number(0.0, 100.0, float),
    "top_p": _number(1e-6, 1.0, float),
    "max_tokens": _number(1, 1_000_000, int),
}
OPTIONS: dict[str, Callable[[str], Any]] = {
    **SAMPLING,
    "stop": str,  # may be given several times
    "system": str,
    "chat_template_kwargs": _json_object,
    "dtype": str,
    "device": str,
    "revision": str,
    "max_model_len": _number(16, 10_000_000, int),
    "gpu_memory_utilization": _number(0.01, 1.0, float),
    "adapter": str,
    "prefix_gib": _number(0.0, 10_000.0, float),
    "key_env": _name,
    "timeout": _number(0.001, 86_400.0, float),
    "concurrency": _number(1, 100_000, int),
    "price_in": _number(0.0, 1e6, float),
    "price_out": _number(0.0, 1e6, float),
}


@dataclass(frozen=True)
class ModelSpec:
    """A parsed model spec.

    Args:
        engine: Which engine runs it.
        model: Its name, id or path.
        urls: Base urls of the servers (`openai` only).
        options: Typed options, see `OPTIONS`; `stop` is a tuple.

    Example:
        >>> spec = parse("openai:llama@http://localhost:8000/v1?temperature=0.5&stop=a&stop=b")
        >>> spec.engine, spec.model, spec.urls, spec.options["stop"]
        ('openai', 'llama', ('http://localhost:8000/v1',), ('a', 'b'))
        >>> spec.sampling().temperature
        0.5
    """

    engine: Engine
    model: str
    urls: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def sampling(self, default: Sampling = Sampling()) -> Sampling:  # noqa: B008 - frozen
        """The sampling options over a default."""
        return replace(default, **{k: self.options[k] for k in (*SAMPLING, "stop") if k in self.options})

    @property
    def prices(self) -> tuple[float, float] | None:
        """Dollars a million tokens read and written (`price_in`, `price_out`); None where the spec tells neither."""
        if not {"price_in", "price_out"} & set(self.options):
            return None
        return self.options.get("price_in", 0.0), self.options.get("price_out", 0.0)

    def __str__(self) -> str:
        prefix = "" if self.engine == "hf" else f"{self.engine}:"
        at = "@" + ",".join(self.urls) if self.urls else ""
        return f"{prefix}{self.model}{at}{format_options(self.options)}"


def format_options(options: Mapping[str, Any]) -> str:
    """Options as the query string of a spec, sorted; the inverse of `split_options`."""
    pairs = []
    for key in sorted(options):
        value = options[key]
        values = value if isinstance(value, tuple) else (json.dumps(value) if isinstance(value, dict) else value,)
        pairs += [f"{key}={quote(str(item), safe='/:,.-_~')}" for item in values]
    return "?" + "&".join(pairs) if pairs else ""


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """A spec without its query string, and the typed options.

    Raises:
        UnknownNameError: An option that does not exist.
        SpecError: A value of the wrong type or range, or an option given twice.
    """
    bare, mark, query = text.partition("?")
    if not mark:
        return bare, {}
    options: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise SpecError(f"spec {text!r}: expected ?key=value&key=value after the name ({error})") from error
    for key, value in pairs:
        converted = convert_option(key, value, text)
        if key == "stop":
            options["stop"] = (*options.get("stop", ()), converted)
        elif key in options:
            raise SpecError(f"spec {text!r}: option {key!r} is given twice")
        else:
            options[key] = converted
    return bare, options


def convert_option(key: str, value: str, where: str) -> Any:
    """One option's typed value."""
    if key not in OPTIONS:
        raise UnknownNameError(f"option in spec {where!r}", key, OPTIONS)
    try:
        return OPTIONS[key](value)
    except ValueError as error:
        raise SpecError(f"spec {where!r}: option {key!r} has the value {value!r}, which does not fit ({error})") from error


def parse(text: str, folder: str | Path = ".") -> ModelSpec:
    """Parse a model spec.

    Args:
        text: The spec.
        folder: Where `usp-env.toml` is looked up for `@name`.

    Raises:
        SpecError: The spec breaks the grammar; the message shows the form that fits.
        UnknownNameError: An unknown option or endpoint.
    """
    if not isinstance(text, str) or not text.strip():
        raise SpecError(f"expected a model spec such as 'smollm2-135m' or 'openai:MODEL@URL', got {text!r}")
    if text.startswith("@"):
        return _endpoint(text, Path(folder))
    bare, options = split_options(text)
    if bare.startswith("openai:"):
        model, at, where = bare.removeprefix("openai:").rpartition("@")
        urls = tuple(url.strip().rstrip("/") for url in where.split(",") if url.strip())
        if not model or not at or not urls or not all(_is_url(url) for url in urls):
            raise SpecError(f"spec {text!r}: expected openai:MODEL@URL[,URL], e.g. 'openai:llama@http://localhost:8000/v1'")
        return ModelSpec("openai", model, urls, options)
    if bare.startswith("vllm:"):
        return ModelSpec("vllm", _model(bare.removeprefix("vllm:"), text), (), options)
    return ModelSpec("hf", _model(bare, text), (), options)


def _model(name: str, text: str) -> str:
    if not re.fullmatch(r"[^\s@]+", name):
        raise SpecError(f"spec {text!r}: expected a model's name, id or path before the options, got {name!r}")
    return name


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises where it is no port
    except ValueError:
        return False
    if not all("!" <= char <= "~" for char in text):
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc) and "@" not in parts.netloc


def _endpoint(text: str, folder: Path) -> ModelSpec:
    bare, options = split_options(text)
    name, path = bare.removeprefix("@"), folder / TOML
    if not path.is_file():
        raise SpecError(
            f"spec {text!r} names an endpoint, but there is no {TOML} in {folder.resolve()}; expected a table [endpoints.{name}]"
        )
    try:
        endpoints = tomllib.loads(read_text(path, SpecError)).get("endpoints", {})
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not valid TOML ({error})") from error
    if not isinstance(endpoints, dict) or not all(isinstance(table, dict) for table in endpoints.values()):
        raise SpecError(f"{path}: expected tables [endpoints.NAME], got endpoints = {endpoints!r:.80}")
    if name not in endpoints:
        raise UnknownNameError(f"endpoint in {path}", name, endpoints)
    table = dict(endpoints[name])
    model, urls = table.pop("model", None), table.pop("url", [])
    urls = [urls] if isinstance(urls, str) else urls
    if not isinstance(model, str) or not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise SpecError(f'{path}, [endpoints.{name}]: expected model = "NAME" and, for a server, url = "URL" or a list of them')
    base = f"openai:{model}@{','.join(urls)}" if urls else model
    if "stop" in table:
        table["stop"] = (table["stop"],) if isinstance(table["stop"], str) else tuple(table["stop"])
    known = {
        k: v if k == "stop" else convert_option(k, json.dumps(v) if isinstance(v, dict) else str(v), text)
        for k, v in table.items()
    }
    spec = parse(base)
    return replace(spec, options={**spec.options, **known, **options})
