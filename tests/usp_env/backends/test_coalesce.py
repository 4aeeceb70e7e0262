"""Merging concurrent calls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from usp_env.backends import coalesce
from usp_env.backends.base import Backend, Generation, Request
from usp_env.backends.coalesce import CoalescingBackend
from usp_env.backends.scripted import ScriptedBackend
from usp_env.errors import BackendError, SpecError


def ask(text: str) -> Request:
    return Request([{"role": "user", "content": text}])


def shout(request: Request) -> str:
    return request.messages[-1]["content"].upper()


def texts(made: Sequence[Generation]) -> list[str]:
    return [generation.text for generation in made]


def test_it_is_a_backend_of_its_engines_identity() -> None:
    engine = ScriptedBackend(shout)
    backend = CoalescingBackend(engine)
    assert isinstance(backend, Backend)
    assert (backend.spec, backend.identity, backend.mutable) == (engine.spec, engine.identity, False)
    assert texts(backend.generate([ask("a"), ask("b")])) == ["A", "B"]
    assert backend.generate([]) == []
    with pytest.raises(SpecError):
        CoalescingBackend(engine, max_batch=0)


def test_threads_get_their_own_answers_in_few_calls() -> None:
    engine = ScriptedBackend(shout, latency=0.01)
    backend, answers = CoalescingBackend(engine, max_batch=8, max_wait_ms=20), {}

    def one(i: int) -> None:
        answers[i] = texts(backend.generate([ask(f"t{i}"), ask(f"u{i}")]))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: [f"T{i}", f"U{i}"] for i in range(20)}
    assert max(engine.batches) == 8
    assert sum(engine.batches) == 40
    assert backend.batches == engine.batches


def test_a_call_larger_than_a_batch_goes_as_it_is() -> None:
    engine = ScriptedBackend(shout)
    assert len(CoalescingBackend(engine, max_batch=2).generate([ask(str(i)) for i in range(5)])) == 5
    assert engine.batches == [5]


def test_nobody_waits_longer_than_said() -> None:
    backend = CoalescingBackend(ScriptedBackend(shout), max_batch=64, max_wait_ms=30)
    start = time.perf_counter()
    backend.generate([ask("alone")])
    assert 0.025 < time.perf_counter() - start < 0.5


def test_a_cancelled_call_is_left_out() -> None:
    engine = ScriptedBackend(shout, latency=0.05)
    backend = CoalescingBackend(engine, max_batch=4, max_wait_ms=1)

    async def main() -> list[str]:
        first = asyncio.ensure_future(backend.agenerate([ask("first")]))
        await asyncio.sleep(0.02)  # on its way
        rest = [asyncio.ensure_future(backend.agenerate([ask(f"r{i}")])) for i in range(4)]
        await asyncio.sleep(0.005)
        rest[1].cancel()  # waits
        first.cancel()  # is being served
        done = await asyncio.gather(first, *rest, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert isinstance(done[2], asyncio.CancelledError)
        return [made[0].text for made in done if isinstance(made, list)]

    assert asyncio.run(main()) == ["R0", "R2", "R3"]
    assert [r.messages[-1]["content"] for r in engine.history] == ["first", "r0", "r2", "r3"]


def test_a_bad_request_is_told_to_its_caller_alone() -> None:
    class Picky(ScriptedBackend):
        def generate(self, requests: Sequence[Request]) -> list[Generation]:
            if any(request.messages is None for request in requests):
                raise SpecError("no prompt")
            return super().generate(requests)

    backend = CoalescingBackend(Picky(shout), max_wait_ms=50)

    async def main() -> list[object]:
        calls = [backend.agenerate([ask("a")]), backend.agenerate([Request()]), backend.agenerate([ask("b")])]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, bad, fine = asyncio.run(main())
    assert (texts(good), texts(fine)) == (["A"], ["B"])
    assert isinstance(bad, SpecError)


def test_an_engine_that_fails_fails_the_batch_once() -> None:
    class Down(ScriptedBackend):
        def generate(self, requests: Sequence[Request]) -> list[Generation]:
            self.batches.append(len(requests))
            raise BackendError("server gone")

    engine = Down(shout)
    backend = CoalescingBackend(engine, max_wait_ms=50)

    async def main() -> list[object]:
        return await asyncio.gather(*(backend.agenerate([ask(str(i))]) for i in range(5)), return_exceptions=True)

    assert all(isinstance(error, BackendError) for error in asyncio.run(main()))
    assert engine.batches == [5]


def test_the_thread_ends_when_idle_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalesce, "_IDLE_SECONDS", 0.05)
    backend = CoalescingBackend(ScriptedBackend(shout), max_wait_ms=0)
    for text in ("a", "b"):
        assert texts(backend.generate([ask(text)])) == [text.upper()]
        time.sleep(0.2)
        assert not any(thread.name == "usp-env-coalesce" and thread is backend._thread for thread in threading.enumerate())
