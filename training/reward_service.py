"""The reward of the user's seat as an HTTP service, for trainers that run elsewhere (verl, OpenRLHF, our own).

    python -m training.reward_service --host 127.0.0.1 --port 5000                # Eq. 6: r_k = .8·cc + .2·human_k
    python -m training.reward_service --lambda 0.5 --generator wangkevin02/Profile_Generator --embedder simcse
    python -m training.reward_service --reward "0.8*cycle+0.2*human+0.1*my.module:politeness"

    curl localhost:5000/reward -d '{"profile": {"objective": "You cook.", "subjective": "You are terse."},
                                    "messages": [{"role": "user", "content": "soup?"}]}'

`POST /reward` takes one item or `{"items": [...]}`; the JSON is told in `usp_env.rewards.wire`, and `usp_env.rewards.remote` is a
client. Requests that arrive together are scored together, in one thread. Whatever is wrong has a type, and never a number:

    400  a body that breaks the format         413  a body above --max-body, or more items than --queue
    500  the reward raised on this item        502  a model failed on this item (try again)
    503  the queue is full, models are being loaded, or the service stops (try again after `Retry-After` seconds)

In `{"results": [...]}` each item has its own error. `GET /health` is 200 once the models are loaded, else 503. SIGTERM finishes
what is queued and exits 0; a second one ends at once. Contents are never logged. There is no password: keep it behind a firewall.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from training.reward_answers import Refusal, answer, body_of, json_response, typed_errors
from training.reward_batches import Batcher, QueueFullError, StoppingError
from training.reward_scoring import WARM_UP, Outcome, expression, models, open_reward, score
from usp_env.errors import SpecError, UspError, require
from usp_env.rewards.base import WeightedSum
from usp_env.rewards.wire import Failure, Item, read_body, read_item

require("aiohttp", "service")
from aiohttp import web  # noqa: E402

MIB = 2**20
_WRITING = 5.0  # seconds that the last answers have to leave
_log = logging.getLogger("usp_env.reward_service")
_http_log = logging.getLogger("usp_env.reward_service.http")
_http_log.setLevel(logging.CRITICAL)  # aiohttp quotes what it could not read


class Service:
    """The state behind the handlers.

    Args:
        make: Gives the reward; called once in the worker's thread, since it loads models.
        max_batch: Most dialogues of one call of the reward.
        max_wait_ms: Longest wait for company, in milliseconds.
        queue: Most dialogues that wait.
        max_body: Most bytes of a request's body.

    Attributes:
        state: `"loading"`, `"ready"` or `"stopping"`.
        port: Where it listens; 0 before it does.
    """

    def __init__(
        self,
        make: Callable[[], WeightedSum],
        *,
        max_batch: int = 64,
        max_wait_ms: float = 20.0,
        queue: int = 1024,
        max_body: int = 16 * MIB,
    ) -> None:
        self._make, self.max_body = make, max_body
        self.state, self.port = "loading", 0
        self.reward: WeightedSum | None = None
        self.models: dict[str, Any] = {}
        self.counts = {"scored": 0, "not_scorable": 0, "failed": 0}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="usp-env-reward")
        self.batcher: Batcher[Item, Outcome] = Batcher(self._score, self._worker, max_batch, max_wait_ms / 1000, queue)

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=self.max_body, middlewares=[typed_errors])
        app.add_routes([web.post("/reward", self.post_reward), web.get("/health", self.get_health)])
        return app

    async def run(self, host: str, port: int, stop: asyncio.Event, ready: Callable[[], object] = lambda: None) -> None:
        """Listen, load, score until `stop`, finish what is queued.

        Args:
            host: Address to listen at.
            port: 0 takes a free one.
            stop: Ends the service.
            ready: Called once the models are loaded.

        Raises:
            OSError: The port is taken.
            UspError: The reward cannot be made.
        """
        # A caller that hangs up cancels its handler, and with it what it has in the queue.
        settings: dict[str, Any] = {"access_log": None, "logger": _http_log, "shutdown_timeout": _WRITING}
        runner = web.AppRunner(self.app(), handler_cancellation=True, **settings)
        await runner.setup()
        scoring: asyncio.Task[None] | None = None
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
            self.port = runner.addresses[0][1]
            if await _before(stop, asyncio.get_running_loop().run_in_executor(self._worker, self._load)):
                scoring = asyncio.create_task(self.batcher.run())
                self.state = "ready"
                ready()
                await _before(stop, scoring)  # it ends before only if it is broken
            self.state = "stopping"
            self.batcher.drain()
            await site.stop()
            if scoring is not None:
                await scoring
        finally:
            await runner.cleanup()  # waits until the answers are on their way
            self._worker.shutdown(wait=False, cancel_futures=True)

    async def post_reward(self, request: web.Request) -> web.StreamResponse:
        """`POST /reward`."""
        body = read_body(await request.read())
        if self.state == "loading":
            raise Refusal("loading", "expected a service that is ready; its models are being loaded", 2)
        if "items" not in body:
            (outcome,) = await self._submit([read_item(body)])
            return answer(outcome)
        items = body["items"]
        if not isinstance(items, list):
            raise SpecError(f"items: expected a list of items, got {type(items).__name__}")
        if len(items) > self.batcher.limit:
            raise Refusal("too_large", f"items: expected at most {self.batcher.limit}, got {len(items)}")
        read = [_read(item) for item in items]
        good = iter(await self._submit([item for item in read if isinstance(item, Item)]))
        return json_response(200, {"results": [body_of(next(good) if isinstance(item, Item) else item) for item in read]})

    async def get_health(self, request: web.Request) -> web.StreamResponse:
        """`GET /health`."""
        health = {
            "state": self.state,
            "queue": len(self.batcher),
            "queue_limit": self.batcher.limit,
            "busy_seconds": round(self.batcher.busy_seconds, 3),
            "batches": self.batcher.batches,
            **self.counts,
            "reward": None if self.reward is None else str(self.reward),
            "models": self.models,
        }
        return json_response(200 if self.state == "ready" else 503, health)

    async def _submit(self, items: Sequence[Item]) -> list[Outcome]:
        try:
            return await self.batcher.submit(items)
        except QueueFullError as error:
            raise Refusal("queue_full", str(error), self.batcher.retry_after) from None
        except StoppingError as error:
            raise Refusal("stopping", str(error), 2) from None

    def _load(self) -> None:
        reward = self._make()
        self.models = models(reward)
        (outcome,) = score(reward, [WARM_UP])  # what is loaded with its first use is loaded now
        if isinstance(outcome, Failure):
            _log.warning("the first score failed (%s); ready all the same", outcome.type)
        self.reward = reward

    def _score(self, items: list[Item]) -> list[Outcome]:
        assert self.reward is not None
        outcomes = score(self.reward, items)
        for outcome in outcomes:
            kind = "failed" if isinstance(outcome, Failure) else "scored" if outcome["valid"] else "not_scorable"
            self.counts[kind] += 1
        return outcomes


async def _before(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Whether the work was done before the stop; raises what the work raises, and leaves it alone where it goes on."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    return task.done()


def _read(value: Any) -> Item | Failure:
    try:
        return read_item(value)
    except SpecError as error:
        return Failure("bad_request", str(error))


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--port", type=int, default=5000, help="0 takes a free one")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--reward", help="an expression; default: Eq. 6")
    what.add_argument("--lambda", dest="lam", type=float, default=0.8, help="weight of cycle consistency in Eq. 6")
    made.add_argument("--generator", help="profile generator of the part 'cycle'; default: the packaged one")
    made.add_argument("--embedder", help="embedder of the part 'cycle'; default: auto")
    made.add_argument("--max-batch", type=int, default=64, help="most dialogues of one call of the reward")
    made.add_argument("--max-wait-ms", type=float, default=20.0, help="longest wait for company")
    made.add_argument("--queue", type=int, default=1024, help="most dialogues that wait")
    made.add_argument("--max-body", type=float, default=16.0, help="most MiB of a request")
    return made


async def serve(args: argparse.Namespace) -> None:
    """Run the service until SIGTERM or SIGINT."""
    text = args.reward if args.reward is not None else expression(args.lam)
    limits = {"max_batch": args.max_batch, "max_wait_ms": args.max_wait_ms, "queue": args.queue}
    service = Service(partial(open_reward, text, args.generator, args.embedder), max_body=int(args.max_body * MIB), **limits)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # a second one ends at once
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    await service.run(
        args.host, args.port, stop, lambda: print(f"ready: http://{args.host}:{service.port}/reward  {text}", flush=True)
    )
    counts = service.counts
    print(f"stopped: {counts['scored']} scored, {counts['not_scorable']} not scorable, {counts['failed']} failed", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    args = parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a log is no terminal
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(args))
    except UspError as error:
        print(f"reward_service: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"reward_service: cannot listen at {args.host}:{args.port}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
