"""The scripted backend."""

from __future__ import annotations

import asyncio
import time

import pytest

from usp_env.backends.base import Backend, Generation, Request
from usp_env.backends.scripted import ScriptedBackend
from usp_env.errors import BackendError, SpecError


def ask(text: str) -> Request:
    return Request([{"role": "user", "content": text}])


def test_a_function_answers_each_request() -> None:
    backend = ScriptedBackend(lambda request: f"{request.seed}", spec="seeds")
    made = backend.generate([Request(seed=3), Request(seed=1)])
    assert [g.text for g in made] == ["3", "1"]
    assert [request.seed for request in backend.history] == [3, 1]
    assert (backend.batches, backend.identity, backend.mutable) == ([2], {"engine": "scripted", "spec": "seeds"}, False)
    assert isinstance(backend, Backend)


def test_a_list_is_said_in_order_across_calls_and_then_is_over() -> None:
    error = BackendError("down")
    backend = ScriptedBackend(["a", error, Generation("b", finish_reason="end")])
    first = backend.generate([ask("x"), ask("y")])
    assert (first[0].text, first[0].finish_reason, first[0].error) == ("a", "stop", None)
    assert (first[1].text, first[1].finish_reason, first[1].error) == ("", "error", error)
    assert asyncio.run(backend.agenerate([ask("z")])) == [Generation("b", finish_reason="end")]
    with pytest.raises(SpecError, match="at most 3"):
        backend.generate([ask("one more")])


def test_latency_is_paid_once_a_call() -> None:
    backend = ScriptedBackend(lambda request: "x", latency=0.05)
    start = time.perf_counter()
    backend.generate([ask("a")] * 20)
    asyncio.run(backend.agenerate([ask("a")] * 20))
    assert 0.1 <= time.perf_counter() - start < 0.5
