"""Tokens a second through the vector environment, against the bare backend on the same requests, and against a loop.

    python -m benchmarks.rollout_throughput [--num-envs 32] [--turns 4] [--user usp-mini] [--skip-loop]

One run, three parts: (a) `DialogueVectorEnv`, every request noted; (b) the backend alone, given the same requests in
the same batches; (c) as many single environments one after another. Prints tokens/s of each, (a)/(b), (a)/(c), and the
share of replies that (a) and (b), (a) and (c) have in common.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from benchmarks.page import Section, command_line
from usp_env import backends, users
from usp_env.backends.base import Backend, Generation, Request
from usp_env.backends.spec import ModelSpec
from usp_env.env import DialogueEnv
from usp_env.sampling import load_sampler
from usp_env.users.base import Partner
from usp_env.vector import DialogueVectorEnv

ANSWERS = ("Happy to help. What have you tried so far?", "I see. Start with the simplest case.", "Yes, that works.", "Done.")


class Noted:
    """A backend that notes what it is asked."""

    def __init__(self, inner: Backend) -> None:
        self.inner, self.batches, self.tokens = inner, [], 0
        self.spec, self.identity, self.mutable = inner.spec, inner.identity, inner.mutable

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Ask the inner backend."""
        self.batches.append(list(requests))
        made = self.inner.generate(requests)
        self.tokens += sum(g.usage["completion_tokens"] for g in made)
        return made


def load(spec: str) -> tuple[Partner, Noted]:
    """A user, and the notes of its backend."""
    noted: list[Noted] = []

    def source(model: ModelSpec) -> Backend:
        noted.append(Noted(backends.load(model)))
        return noted[0]

    return users.load(spec, source), noted[0]


def through_vector(spec: str, n: int, turns: int, settings: dict[str, object]) -> tuple[Noted, float, list[str]]:
    """Part (a): the notes, the seconds, and what was said."""
    user, noted = load(spec)
    noted.inner.generate([Request([{"role": "user", "content": "warm up"}])])
    forget(noted)
    envs = DialogueVectorEnv(n, user, load_sampler(), None, autoreset_mode="NextStep", **settings)
    start = time.perf_counter()
    envs.reset(seed=0)
    for turn in range(turns):
        envs.step([ANSWERS[turn % 4]] * n)
    seconds = time.perf_counter() - start
    return noted, seconds, [message.content for episode in envs.episodes for message in episode.messages]


def bare(noted: Noted) -> tuple[int, float]:
    """Part (b): tokens and seconds of the same requests in the same batches, from an empty store of keys and values."""
    forget(noted)
    start = time.perf_counter()
    made = [g for batch in list(noted.batches) for g in noted.inner.generate(batch)]
    return sum(g.usage["completion_tokens"] for g in made), time.perf_counter() - start


def in_a_loop(spec: str, n: int, turns: int, settings: dict[str, object]) -> tuple[int, float, list[str]]:
    """Part (c): tokens, seconds and what was said, one environment after another."""
    user, noted = load(spec)
    forget(noted)
    said = []
    start = time.perf_counter()
    for lane in range(n):
        env = DialogueEnv(user, load_sampler(), None, **settings)
        env.reset(seed=lane)
        for turn in range(turns):
            if env.episode.done:
                env.reset()
            else:
                env.step(ANSWERS[turn % 4])
        said += [message.content for message in env.episode.messages]
    return noted.tokens, time.perf_counter() - start, said


def forget(noted: Noted) -> None:
    """Each part begins with nothing kept."""
    if hasattr(noted.inner, "forget"):
        noted.inner.forget()


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    # No early endings by loops; a dialogue that ends all the same is followed by another.
    settings = {"max_turns": args.turns, "repetition_ratio": 1.1, "gratitude_words": 0}
    noted, seconds, said = through_vector(args.user, args.num_envs, args.turns, settings)
    rate = noted.tokens / seconds
    tokens, alone = bare(noted)
    rows = [
        ["vector environment", noted.tokens, f"{seconds:.1f}", f"{rate:.1f}", "1"],
        ["bare backend, same requests", tokens, f"{alone:.1f}", f"{tokens / alone:.1f}", f"{rate / (tokens / alone):.3f}"],
    ]
    text = f"{args.num_envs} dialogues of {args.turns} turns, `{args.user}`. Ratio: the vector environment's rate over the row's."
    if not args.skip_loop:
        looped, spent, again = in_a_loop(args.user, args.num_envs, args.turns, settings)
        rows.append(
            ["single environments in a loop", looped, f"{spent:.1f}", f"{looped / spent:.1f}", f"{rate * spent / looped:.2f}"]
        )
        same = sum(a == b for a, b in zip(said, again, strict=False)) / len(said)
        text += f" {same:.2%} of the messages are the same in the vector environment and in the loop."
    header = ["", "tokens", "seconds", "tokens/s", "ratio"]
    return Section("Throughput on a real model", command_line("rollout_throughput", parser(), args), header, rows, text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--num-envs", type=int, default=32)
    made.add_argument("--turns", type=int, default=4)
    made.add_argument("--user", default="usp-mini?max_tokens=24")
    made.add_argument("--skip-loop", action="store_true")
    return made


if __name__ == "__main__":
    section(parser().parse_args()).show()
