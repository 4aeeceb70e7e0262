"""What the environment itself costs: zero-latency users, then users that take a second per batched call.

    python -m benchmarks.env_overhead

Prints, per number of environments and autoreset mode: milliseconds per turn and environment (median of five
blocks), and the share of the ideal rate (`num_envs / latency` steps a second) with a latent partner.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from benchmarks.page import Section, command_line
from usp_env.dialogue import View
from usp_env.profiles import ProfileBank
from usp_env.records import Reply
from usp_env.sampling import load_sampler
from usp_env.vector import DialogueVectorEnv

ANSWER = "Sure. Here is the answer that you asked for; tell me if anything in it is unclear."


class RequestUser:
    """Asks one of the bank's real requests at each turn, and ends one conversation in eight; `latency` seconds a batch."""

    role, spec = "user", "requests"

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.texts = [detail for profile in ProfileBank.load("sharegpt", "train") for detail in profile.task_details]

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """One request per view."""
        if self.latency:
            time.sleep(self.latency)
        return [
            Reply("", ended=True) if seed % 8 == 0 and not view.opening else Reply(self.texts[seed % len(self.texts)])
            for view, seed in zip(views, seeds, strict=True)
        ]


def overhead(num_envs: int, mode: str, steps: int) -> float:
    """Milliseconds per turn and environment, median of five blocks of `steps`."""
    envs = DialogueVectorEnv(num_envs, RequestUser(0.0), load_sampler(), None, autoreset_mode=mode)
    envs.reset(seed=0)
    blocks = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(steps):
            envs.step([ANSWER] * num_envs)
        blocks.append(1e3 * (time.perf_counter() - start) / steps / num_envs)
    return statistics.median(blocks)


def share_of_ideal(num_envs: int, mode: str, latency: float, steps: int) -> float:
    """Steps a second as a share of `num_envs / latency`, the reset's batch included.

    Lanes end at different steps, so that every step needs a call; in `SameStep` the openings of new episodes are a second one.
    """
    envs = DialogueVectorEnv(num_envs, RequestUser(latency), load_sampler(), None, autoreset_mode=mode)
    start = time.perf_counter()
    envs.reset(seed=0)
    for _ in range(steps):
        envs.step([ANSWER] * num_envs)
    return (steps + 1) * latency / (time.perf_counter() - start)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--num-envs", type=int, nargs="+", default=[64, 256, 1024])
    made.add_argument("--latency", type=float, default=1.0, help="seconds per batched call")
    made.add_argument("--steps", type=int, default=22, help="per block: two episodes of ten turns and their resets")
    return made


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    rows = []
    for num_envs in args.num_envs:
        for mode in ("NextStep", "SameStep"):
            cost = overhead(num_envs, mode, args.steps)
            share = share_of_ideal(num_envs, mode, args.latency, args.steps)
            rows.append([num_envs, mode, f"{cost:.4f}", f"{share:.3f}"])
    text = (
        "The environment with users that cost nothing: milliseconds per turn and environment (median of five blocks). "
        f"With users that take {args.latency} s per batched call: steps a second as a share of `num_envs / latency`, "
        "resets included. In `SameStep` the openings of new episodes are a second call of the same step."
    )
    header = ["environments", "autoreset", "ms a turn and environment", "share of ideal"]
    return Section("What the environment costs", command_line("env_overhead", parser(), args), header, rows, text)


if __name__ == "__main__":
    section(parser().parse_args()).show()
