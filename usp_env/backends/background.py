"""One event loop per process, in a thread of its own, for engines whose clients are asynchronous.

`generate` stays synchronous and may be called from several threads or from inside a running loop, and connections
live as long as the process rather than as long as one call. A forked child starts a loop of its own and leaves
the parent's connections alone.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
Closer = Callable[[], Awaitable[None]]

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_closers: set[Closer] = set()
_inherited: list[object] = []  # the parent's: finalising them in a forked child would warn of open sockets


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop and wait; an interrupt cancels it.

    Raises:
        RuntimeError: Called on the loop itself, which would wait for ever.
    """
    if threading.current_thread() is _thread:
        coroutine.close()
        raise RuntimeError("expected a call from outside the backends' event loop; await agenerate() instead of generate()")
    future = asyncio.run_coroutine_threadsafe(coroutine, _start())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def arun(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop from another one; cancelling the caller cancels it."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _start()))


def close_later(closer: Closer) -> None:
    """Run a closer on the loop without waiting; nothing once the loop has gone. For finalizers."""
    if _loop is not None and closer in _closers:
        asyncio.run_coroutine_threadsafe(_await(closer), _loop)


def add_closer(closer: Closer) -> None:
    """Run `closer` on the loop when the process ends."""
    _closers.add(closer)


def discard_closer(closer: Closer) -> None:
    """What has been closed needs no closer."""
    _closers.discard(closer)


def keep_inherited(thing: object) -> None:
    """Keep a forked parent's connections from being finalised here."""
    if thing is not None:
        _inherited.append(thing)


def _start() -> asyncio.AbstractEventLoop:
    global _loop, _thread
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_loop.run_forever, name="usp-env-io", daemon=True)
            _thread.start()
        return _loop


@atexit.register
def _stop() -> None:
    global _loop, _thread
    loop, thread, _loop, _thread = _loop, _thread, None, None
    if loop is None or thread is None:
        return
    concurrent.futures.wait([asyncio.run_coroutine_threadsafe(_finish(), loop)], timeout=5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    if not thread.is_alive():
        loop.close()


async def _finish() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for closer in tuple(_closers):
        await closer()


async def _await(closer: Closer) -> None:
    await closer()


def _forget() -> None:
    """In a forked child, where the thread does not exist and the lock may be held by nobody."""
    global _lock, _loop, _thread, _closers
    _inherited.extend((_loop, _thread, _closers))
    _lock, _loop, _thread, _closers = threading.Lock(), None, None, set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
