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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--user", default="usp-mini?max_tokens=48")
    parser.add_argument("--skip-loop", action="store_true")
    args = parser.parse_args()
    n, sampler = args.num_envs, load_sampler()
    # No early endings by loops; a dialogue that ends all the same is followed by another.
    settings = {"max_turns": args.turns, "repetition_ratio": 1.1, "gratitude_words": 0}

    user, noted = load(args.user)
    noted.inner.generate([Request([{"role": "user", "content": "warm up"}])])
    envs = DialogueVectorEnv(n, user, sampler, None, autoreset_mode="NextStep", **settings)
    start = time.perf_counter()
    envs.reset(seed=0)
    for turn in range(args.turns):
        envs.step([ANSWERS[turn % 4]] * n)
    through = time.perf_counter() - start
    said = [message.content for episode in envs.episodes for message in episode.messages]

    start = time.perf_counter()
    bare = [g for batch in noted.batches for g in noted.inner.generate(batch)]
    alone = time.perf_counter() - start
    tokens = sum(g.usage["completion_tokens"] for g in bare)
    print(f"vector env   {noted.tokens / through:7.1f} tokens/s  ({noted.tokens} tokens, {through:.1f} s)")
    print(f"bare backend {tokens / alone:7.1f} tokens/s  ({tokens} tokens, {alone:.1f} s)")
    print(f"vector env / bare backend: {noted.tokens / through / (tokens / alone):.3f}", flush=True)
    if args.skip_loop:
        return

    looped, notes = load(args.user)
    again = []
    start = time.perf_counter()
    for lane in range(n):
        env = DialogueEnv(looped, sampler, None, **settings)
        env.reset(seed=lane)
        for turn in range(args.turns):
            if env.episode.done:
                env.reset()
            else:
                env.step(ANSWERS[turn % 4])
        again += [message.content for message in env.episode.messages]
    loop = time.perf_counter() - start
    print(f"single envs  {notes.tokens / loop:7.1f} tokens/s  ({notes.tokens} tokens, {loop:.1f} s)")
    print(f"vector env / single envs: {noted.tokens / through / (notes.tokens / loop):.2f}")
    print(f"messages that are the same in both: {sum(a == b for a, b in zip(said, again, strict=False)) / len(said):.4f}")


if __name__ == "__main__":
    main()
