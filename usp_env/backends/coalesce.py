"""Merge concurrent calls into batches, for callers that each have one request: coroutines, threads, agents' loops.

    users.load("usp-mini", backends.load_coalesced)      # 256 coroutines, one batched engine call

Calls wait in one queue. A batch leaves when it is full, or when its oldest call has waited `max_wait_ms`; while the engine
works, the queue fills by itself. A call that is cancelled while it waits is left out; one that is cancelled on its
way is served for nobody. What fails on one call's account is told to that call alone.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from usp_env.backends.base import Backend, Generation, Request
from usp_env.errors import BackendError, SpecError

_IDLE_SECONDS = 2.0  # the thread ends after so long without work, and begins again with the next call


@dataclass(frozen=True, slots=True)
class _Call:
    requests: tuple[Request, ...]
    future: Future[list[Generation]] = field(default_factory=Future)
    born: float = field(default_factory=time.monotonic)


class CoalescingBackend:
    """A backend that serves many callers with few calls of another one. Safe from any thread and event loop.

    Args:
        backend: The engine.
        max_batch: Most requests of one engine call; a single call with more goes as it is.
        max_wait_ms: Longest wait for company, in milliseconds.

    Attributes:
        batches: Sizes of the engine calls so far.
    """

    def __init__(self, backend: Backend, max_batch: int = 64, max_wait_ms: float = 5.0) -> None:
        if max_batch < 1 or max_wait_ms < 0:
            raise SpecError(f"expected max_batch ≥ 1 and max_wait_ms ≥ 0, got {max_batch!r} and {max_wait_ms!r}")
        self.backend, self.max_batch, self.max_wait_ms = backend, max_batch, max_wait_ms
        self.batches: list[int] = []
        self._queue: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def spec(self) -> str:
        """The engine's."""
        return self.backend.spec

    @property
    def identity(self) -> Mapping[str, Any]:
        """The engine's."""
        return self.backend.identity

    @property
    def mutable(self) -> bool:
        """The engine's."""
        return self.backend.mutable

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation per request, in order, in a batch with whoever else calls."""
        return self._submit(requests).result()

    async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` for event loops; cancelling it disturbs nobody else."""
        return await asyncio.wrap_future(self._submit(requests))

    def __deepcopy__(self, memo: dict[int, Any]) -> CoalescingBackend:
        return self  # engines are shared

    def _submit(self, requests: Sequence[Request]) -> Future[list[Generation]]:
        call = _Call(tuple(requests))
        if not call.requests:
            call.future.set_result([])
            return call.future
        with self._lock:  # so that the thread cannot end between the look and the put
            self._queue.put(call)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="usp-env-coalesce", daemon=True)
                self._thread.start()
        return call.future

    def _work(self) -> None:
        waiting: list[_Call] = []
        while True:
            if not waiting:
                try:
                    waiting.append(self._queue.get(timeout=_IDLE_SECONDS))
                except queue.Empty:
                    with self._lock:
                        if self._queue.empty():
                            self._thread = None
                            return
                    continue
            self._gather(waiting)
            batch, waiting = _cut(waiting, self.max_batch)
            taken = [call for call in batch if call.future.set_running_or_notify_cancel()]
            if taken:
                self._serve(taken)

    def _gather(self, waiting: list[_Call]) -> None:
        """Take what is queued, and wait for more while the batch has room and its oldest call has time."""
        deadline = waiting[0].born + self.max_wait_ms / 1000
        while sum(len(call.requests) for call in waiting) < self.max_batch:
            try:
                waiting.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return

    def _serve(self, calls: Sequence[_Call]) -> None:
        requests = [request for call in calls for request in call.requests]
        self.batches.append(len(requests))
        try:
            made = self.backend.generate(requests)
            if len(made) != len(requests):
                raise BackendError(f"{self.spec}: expected {len(requests)} generations, got {len(made)}")
        except BackendError as error:
            for call in calls:
                call.future.set_exception(error)
        except BaseException as error:
            if len(calls) == 1:
                calls[0].future.set_exception(_carried(error))
            else:  # a request that is no request: find out whose
                for call in calls:
                    self._serve([call])
        else:
            rest = iter(made)
            for call in calls:
                call.future.set_result([next(rest) for _ in call.requests])


def _cut(calls: list[_Call], most: int) -> tuple[list[_Call], list[_Call]]:
    """The calls that go together, at least one, and the rest."""
    size = 0
    for i, call in enumerate(calls):
        size += len(call.requests)
        if size > most and i:
            return calls[:i], calls[i:]
    return calls, []


def _carried(error: BaseException) -> BaseException:
    """No future can carry a StopIteration: whoever awaits it would wait for ever."""
    if not isinstance(error, StopIteration):
        return error
    carried = RuntimeError("the engine raised StopIteration")
    carried.__cause__ = error
    return carried
