"""A reward service in this process, with models that do as the text says."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from training.reward_service import Service
from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError
from usp_env.extraction.generator import ProfileTexts
from usp_env.profiles import Profile
from usp_env.rewards.base import WeightedSum
from usp_env.rewards.cycle import CycleConsistency
from usp_env.rewards.human_likeness import HumanLikeness

COOK = Profile("a", "You cook.", "You are terse.")


def number(text: str) -> float:
    """In [0, 1), of the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


class Models:
    """Generator, embedder and scorer whose answers depend on the text alone. A user who says so makes them fail or wait."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []  # what each dialogue of a call begins with
        self.gate, self.entered = threading.Event(), threading.Event()

    def generate(self, dialogues: Sequence[Dialogue]) -> list[ProfileTexts | BackendError | None]:
        said = [" ".join(dialogue.utterances("user")) for dialogue in dialogues]
        self.batches.append([text[:20] for text in said])
        if any("HOLD" in text for text in said):
            self.entered.set()
            self.gate.wait(15)  # not for ever: a test that fails opens no gate
        if any("LOST" in text for text in said):
            raise BackendError("device lost")
        if any("CRASH" in text for text in said):
            raise ValueError(f"cannot read {said}")
        return [self._read(text) for text in said]

    def _read(self, text: str) -> ProfileTexts | BackendError | None:
        if "DOWN" in text:
            return BackendError("HTTP 500 from the generator")
        return None if "UNREADABLE" in text else ProfileTexts(f"OF {text}", f"SC {text}")

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[number(f"{k}{text}") + 0.01 for k in range(6)] for text in texts])

    def human(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([number(text) for text in texts])

    def reward(self) -> WeightedSum:
        return WeightedSum(((0.8, CycleConsistency(self, self.embed)), (0.2, HumanLikeness(self.human))))


@contextlib.contextmanager
def running(make: Callable[[], WeightedSum], wait: bool = True, **settings: Any) -> Iterator[tuple[Service, int]]:
    """The service and its port; `wait` until its models are loaded."""
    box: dict[str, Any] = {}
    made, ready = threading.Event(), threading.Event()

    async def main() -> None:
        box["stop"], box["loop"] = asyncio.Event(), asyncio.get_running_loop()
        box["service"] = Service(make, **settings)
        made.set()
        await box["service"].run("127.0.0.1", 0, box["stop"], ready.set)

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            box["error"] = error
        ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert made.wait(30)
    until(lambda: bool(box["service"].port) or "error" in box)
    assert not wait or ready.wait(60)
    try:
        yield box["service"], box["service"].port
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(60)
        assert not thread.is_alive()
    if "error" in box:
        raise box["error"]


def call(port: int, body: Any, path: str = "/reward", method: str = "POST", **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of one request."""
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, raw, {key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), {key.lower(): value for key, value in response.getheaders()}
    finally:
        connection.close()


def health(port: int) -> dict[str, Any]:
    found: dict[str, Any] = call(port, None, "/health", "GET")[1]
    return found


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def item(*said: str, objective: str = "You cook.", subjective: str = "You are terse.") -> dict[str, Any]:
    """What users say in turn, the assistant between them."""
    messages = []
    for text in said:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes?"}]
    return {"profile": {"objective": objective, "subjective": subjective}, "messages": messages[:-1]}


def talk(*said: str) -> Dialogue:
    return Dialogue.of(item(*said)["messages"])


class Calls:
    """Requests on their way, each in a thread; `results()` in the order in which they were begun."""

    def __init__(self, port: int, bodies: Sequence[Any]) -> None:
        self.found: list[Any] = [None] * len(bodies)

        def one(k: int) -> None:
            self.found[k] = call(port, bodies[k])

        self.threads = [threading.Thread(target=one, args=(k,)) for k in range(len(bodies))]
        for thread in self.threads:
            thread.start()

    def results(self) -> list[tuple[int, Any, dict[str, str]]]:
        for thread in self.threads:
            thread.join(60)
        return self.found
