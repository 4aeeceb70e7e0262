"""Engines. `load(spec)` gives the process's one backend for a spec: 64 environments load one model."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Literal

from usp_env.backends.base import Backend
from usp_env.backends.spec import SAMPLING, ModelSpec
from usp_env.errors import UnknownNameError

# What a request or a speaker says for itself does not need an engine of its own.
Mode = Literal["record", "replay", "strict"]
_PER_REQUEST = (*SAMPLING, "stop", "system", "chat_template_kwargs", "price_in", "price_out")
_loaded: dict[str, Backend] = {}
_lock = threading.Lock()


def load(spec: ModelSpec) -> Backend:
    """The shared backend of a spec.

    Raises:
        MissingExtraError: The engine's package is not installed.
        MissingAssetError: The weights have to be fetched first.
    """
    engine = engine_spec(spec)
    key = str(engine)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _build(engine)
        return _loaded[key]


def loaded() -> list[Backend]:
    """The backends that this process shares."""
    with _lock:
        return list(_loaded.values())


def engine_spec(spec: ModelSpec) -> ModelSpec:
    """The part of a spec that decides which engine runs; sampling belongs to requests."""
    return replace(spec, options={k: v for k, v in spec.options.items() if k not in _PER_REQUEST})


def load_coalesced(spec: ModelSpec, max_batch: int = 64, max_wait_ms: float = 5.0) -> Backend:
    """The shared backend of a spec behind a queue that merges concurrent calls; itself shared by the process."""
    from usp_env.backends.coalesce import CoalescingBackend

    engine = load(spec)
    key = f"coalesced {max_batch} {max_wait_ms} {engine_spec(spec)}"
    with _lock:
        return _loaded.setdefault(key, CoalescingBackend(engine, max_batch, max_wait_ms))


def load_cached(spec: ModelSpec, path: str | Path, mode: Mode = "record") -> Backend:
    """The backend of a spec behind a store of generations; `strict` needs neither weights nor a key."""
    from usp_env.backends.cache import CacheBackend

    if mode == "strict":
        return CacheBackend(None, path, mode, spec=str(engine_spec(spec)))
    return CacheBackend(load(spec), path, mode)


def _build(spec: ModelSpec) -> Backend:
    if spec.engine == "hf":
        from usp_env.backends.hf import HFBackend

        return HFBackend.from_spec(spec)
    if spec.engine == "openai":
        from usp_env.backends.openai import OpenAIBackend

        return OpenAIBackend.from_spec(spec)
    if spec.engine == "vllm":
        from usp_env.backends.vllm import VLLMBackend

        return VLLMBackend.from_spec(spec)
    raise UnknownNameError("engine", spec.engine, ["hf", "openai", "vllm"])
