"""A bounded queue in front of one worker thread: what arrives together is scored together.

A batch leaves when it is full, or when its oldest entry has waited `max_wait` seconds; while the worker scores, the queue fills
by itself. An entry whose caller has gone is taken out of the queue. Everything but the scoring is done on one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from usp_env.errors import SpecError, UspError

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741


class QueueFullError(UspError):
    """More entries than the queue has room for."""


class StoppingError(UspError):
    """The queue takes nothing any more."""


@dataclass(eq=False)
class _Entry(Generic[I, O]):
    item: I
    future: asyncio.Future[O]
    born: float = field(default_factory=time.monotonic)


class Batcher(Generic[I, O]):
    """The queue and its worker.

    Args:
        score: One output per input, in order; runs in the executor. It should not raise: what it raises fails its batch.
        executor: Of one thread.
        max_batch: Most entries of one call of `score`.
        max_wait: Longest wait for company, in seconds.
        limit: Most entries that wait.

    Attributes:
        batches: Number of calls of `score` so far.
    """

    def __init__(
        self, score: Callable[[list[I]], Sequence[O]], executor: Executor, max_batch: int, max_wait: float, limit: int
    ) -> None:
        if max_batch < 1 or limit < 1 or not 0 <= max_wait < math.inf:
            raise SpecError(f"expected max_batch ≥ 1, queue ≥ 1 and max_wait ≥ 0, got {max_batch}, {limit} and {max_wait}")
        self._score, self._executor = score, executor
        self.max_batch, self.max_wait, self.limit = max_batch, max_wait, limit
        self.batches = 0
        self._waiting: deque[_Entry[I, O]] = deque()
        self._changed = asyncio.Event()
        self._stopping = False
        self._since: float | None = None
        self._seconds = 0.0  # of the last batch

    def __len__(self) -> int:
        """Entries that wait; those that are being scored do not count."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """How long the worker has been at its batch; 0 where it has none."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    @property
    def retry_after(self) -> int:
        """When there may be room again, in seconds, in [1, 60]: as long as the last batch took, for each that waits."""
        return min(60, max(1, math.ceil(self._seconds * math.ceil(len(self._waiting) / self.max_batch))))

    async def submit(self, items: Sequence[I]) -> list[O]:
        """The outputs of some inputs, in order; cancelling it takes what still waits out of the queue.

        Raises:
            QueueFullError: There is no room for all of them; none was taken.
            StoppingError: `drain` was called.
        """
        if self._stopping:
            raise StoppingError("expected a service that runs; this one is stopping")
        if len(self._waiting) + len(items) > self.limit:
            raise QueueFullError(f"expected room for {len(items)} item(s), got {len(self._waiting)} of {self.limit} waiting")
        loop = asyncio.get_running_loop()
        entries = [_Entry[I, O](item, loop.create_future()) for item in items]
        self._waiting.extend(entries)
        self._changed.set()
        try:
            return list(await asyncio.gather(*(entry.future for entry in entries)))
        except asyncio.CancelledError:
            gone = {id(entry) for entry in entries}
            self._waiting = deque(entry for entry in self._waiting if id(entry) not in gone)
            raise

    async def run(self) -> None:
        """Score until `drain`; then what waits, and return."""
        while self._waiting or not self._stopping:
            await self._gather()
            batch = [self._waiting.popleft() for _ in range(min(self.max_batch, len(self._waiting)))]
            if batch:
                await self._serve(batch)

    def drain(self) -> None:
        """Take nothing any more; `run` returns when what waits is done."""
        self._stopping = True
        self._changed.set()

    async def _gather(self) -> None:
        """Wait until a batch is due, or nothing will come."""
        while not self._stopping and len(self._waiting) < self.max_batch:
            left = self._waiting[0].born + self.max_wait - time.monotonic() if self._waiting else None
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:  # at once where nothing is left
                return

    async def _serve(self, batch: list[_Entry[I, O]]) -> None:
        self._since = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            outputs = await loop.run_in_executor(self._executor, self._score, [entry.item for entry in batch])
            settled = list(zip(batch, outputs, strict=True))
        except Exception as error:
            for entry in batch:
                if not entry.future.done():
                    entry.future.set_exception(error)
        else:
            for entry, output in settled:
                if not entry.future.done():  # its caller may have gone
                    entry.future.set_result(output)
        finally:
            self._seconds, self._since = self.busy_seconds, None
            self.batches += 1
