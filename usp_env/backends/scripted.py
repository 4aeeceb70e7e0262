"""A backend without a model, for tests, examples and benchmarks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from usp_env.backends.base import Generation, Request, failed
from usp_env.errors import BackendError, SpecError

Line = str | Generation | BackendError


class ScriptedBackend:
    """Says what a function of the request, or a list, tells it to.

    Args:
        reply: Called with each request; or lines for the requests in the order in which they come. A line is a text, a whole
            `Generation`, or a `BackendError`, which fails that request alone.
        latency: Seconds that every call of `generate` takes, whatever the number of requests.
        spec: Recorded in transcripts; with it the identity, so give two functions two names.

    Attributes:
        history: Every request that came, in order.
        batches: How many requests came in each call.

    Example:
        >>> backend = ScriptedBackend(lambda request: request.messages[-1]["content"].upper())
        >>> [g.text for g in backend.generate([Request([{"role": "user", "content": "hi"}])])]
        ['HI']
    """

    mutable = False

    def __init__(self, reply: Callable[[Request], Line] | Sequence[Line], latency: float = 0.0, spec: str = "scripted") -> None:
        self.reply, self.latency, self.spec = reply, latency, spec
        self.history: list[Request] = []
        self.batches: list[int] = []

    @property
    def identity(self) -> Mapping[str, Any]:
        """The spec stands for what is said."""
        return {"engine": "scripted", "spec": self.spec}

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation per request, in order.

        Raises:
            SpecError: The list has no line left.
        """
        if self.latency:
            time.sleep(self.latency)
        return self._speak(requests)

    async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` for event loops."""
        await asyncio.sleep(self.latency)
        return self._speak(requests)

    def _speak(self, requests: Sequence[Request]) -> list[Generation]:
        self.batches.append(len(requests))
        return [_generation(self._line(request)) for request in requests]

    def _line(self, request: Request) -> Line:
        number = len(self.history)
        self.history.append(request)
        if callable(self.reply):
            return self.reply(request)
        if number >= len(self.reply):
            raise SpecError(f"expected at most {len(self.reply)} requests, as many as the script has lines, and one more came")
        return self.reply[number]


def _generation(line: Line) -> Generation:
    if isinstance(line, BackendError):
        return failed(line)
    return line if isinstance(line, Generation) else Generation(line, usage={"prompt_tokens": 0, "completion_tokens": 0})
