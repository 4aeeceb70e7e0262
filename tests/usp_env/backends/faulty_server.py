"""An OpenAI-compatible server on 127.0.0.1 that answers from the request alone, and fails as it is told to.

`answer(body)` is a pure function of the request, so a test knows what each call must have got. `Action` says what
happens to one HTTP attempt: an answer, another status, a reset, a stall before or inside the body, broken JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Seen:
    """One HTTP attempt; `attempt` counts from 0 for equal bodies."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    attempt: int


@dataclass(frozen=True)
class Action:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["answer", "reset", "stall", "stall_body"] = "answer"
    delay: float = 0.0


def digest(body: Mapping[str, Any], salt: str = "") -> str:
    return hashlib.sha256((salt + json.dumps(body, sort_keys=True)).encode()).hexdigest()


def answer_text(body: Mapping[str, Any]) -> str:
    return f"answer {digest(body)}"


def answer(seen: Seen, **choice: Any) -> Action:
    text = answer_text(seen.body)
    holder = {"message": {"role": "assistant", "content": text}} if seen.path.endswith("chat/completions") else {"text": text}
    reply = {
        "object": "completion",
        "choices": [{"index": 0, "finish_reason": "stop", **holder, **choice}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}},
    }
    return Action(json.dumps(reply).encode())


def status(http: int, message: str = "no", headers: Mapping[str, str] | None = None, **error: Any) -> Action:
    return Action(json.dumps({"error": {"message": message, **error}}).encode(), http, headers or {})


FAULTS = ("429", "500", "reset", "stall", "stall_body", "malformed")


def fault(seen: Seen, share: float) -> str | None:
    """The fault of an attempt, drawn from its own hash: `share` of all attempts have one."""
    draw = int(digest(seen.body, f"fault {seen.attempt} ")[:12], 16) / 16**12
    return FAULTS[int(draw / share * len(FAULTS))] if draw < share else None


def faulty(share: float = 0.2) -> Callable[[Seen], Action]:
    def respond(seen: Seen) -> Action:
        match fault(seen, share):
            case "429":
                return status(429, "slow down", {"retry-after": "0.05"})
            case "500":
                return status(500, "broken")
            case "reset":
                return Action(kind="reset")
            case "stall":
                return Action(kind="stall")
            case "stall_body":
                return Action(answer(seen).body, kind="stall_body")
            case "malformed":
                # A whole answer that is cut off inside the text: a client that mends it would invent a reply.
                return Action(answer(seen).body[:60])
        return answer(seen)

    return respond


class FaultyServer:
    def __init__(self, respond: Callable[[Seen], Action]) -> None:
        self.respond = respond
        self.seen: list[Seen] = []
        self.connections = self.concurrent = self.most_concurrent = 0
        self._attempts: Counter[str] = Counter()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (seen := await self._read(reader)) is not None:
                self.concurrent += 1
                self.most_concurrent = max(self.most_concurrent, self.concurrent)
                try:
                    if not await self._act(self.respond(seen), reader, writer):
                        return
                finally:
                    self.concurrent -= 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # asyncio's own server logs a cancelled handler as an error
        finally:
            self.connections -= 1
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Seen | None:
        line = await reader.readline()
        if not line:
            return None
        headers = {}
        while (header := (await reader.readline()).decode("latin-1").strip()) != "":
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
        key = digest(body)
        seen = Seen(line.split()[1].decode(), headers, body, self._attempts[key])
        self._attempts[key] += 1
        self.seen.append(seen)
        return seen

    async def _act(self, action: Action, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(action.delay)
        if action.kind == "reset":
            linger = struct.pack("ii", 1, 0)  # close with RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return False
        if action.kind != "stall":
            headers = {"content-type": "application/json", "content-length": str(len(action.body)), **action.headers}
            head = f"HTTP/1.1 {action.status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
            sent = action.body[: len(action.body) // 2] if action.kind == "stall_body" else action.body
            writer.write(head.encode() + sent)
            await writer.drain()
        if action.kind.startswith("stall"):
            await reader.read()  # until the client gives up
            return False
        return True


@contextlib.contextmanager
def serve(respond: Callable[[Seen], Action]) -> Iterator[tuple[FaultyServer, str]]:
    """The running server and its base url."""
    server, loop = FaultyServer(respond), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listener = asyncio.run_coroutine_threadsafe(asyncio.start_server(server.handle, "127.0.0.1", 0), loop).result()
    try:
        yield server, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(_stop(listener), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(listener: asyncio.Server) -> None:
    listener.close()
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    await asyncio.sleep(0)
