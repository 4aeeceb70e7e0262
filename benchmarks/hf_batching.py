"""Ways to batch on transformers: adapters one after the other or in one batch; our decode loop or continuous batching.

    python -m benchmarks.hf_batching [--requests 32] [--adapters 4] [--rows 1 2 4 8 16] [--model smollm2-135m]

Same prompts, same number of greedy tokens, the same weights; the ways take turns, so that a busy machine slows both.
Continuous batching (`transformers`) gives a row to the next request as soon as a reply ends.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.page import Section, command_line
from usp_env.backends.base import Request, Sampling
from usp_env.backends.hf import HFBackend
from usp_env.backends.spec import parse
from usp_env.profiles import ProfileBank

LENGTHS = {"replies of 32 tokens": (32,), "replies of 8, 16, 32 and 64 tokens": (8, 16, 32, 64)}


def requests(num: int, lengths: Sequence[int], adapters: Sequence[str | None] = (None,)) -> list[Request]:
    """What real people want, each with a reply of the next length from the next adapter."""
    people = itertools.cycle(ProfileBank.load("sharegpt", "train")[:num])
    rows = zip(range(num), people, itertools.cycle(lengths), itertools.cycle(adapters), strict=False)
    return [
        Request(
            [{"role": "user", "content": person.objective}],
            sampling=Sampling(temperature=0.0, max_tokens=length, min_tokens=length),
            adapter=adapter,
            can_end=False,
        )
        for _, person, length, adapter in rows
    ]


def seconds(ways: Mapping[str, Callable[[], int]], tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of each way, one after the other in every round; the first round is left out.

    Raises:
        RuntimeError: A way wrote more or fewer tokens.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            made = run()
            taken[name].append(time.perf_counter() - start)
            if made != tokens:
                raise RuntimeError(f"{name}: expected {tokens} tokens, got {made}")
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def written(backend: HFBackend, asked: Sequence[Request]) -> int:
    """Tokens that the backend writes in one call."""
    return sum(len(made.token_ids) for made in backend.generate(asked))


def in_turn(backend: HFBackend, asked: Sequence[Request]) -> int:
    """Tokens of one call for each adapter."""
    return sum(written(backend, [r for r in asked if r.adapter == name]) for name in dict.fromkeys(r.adapter for r in asked))


def continuous(backend: HFBackend, asked: Sequence[Request]) -> int:
    """Tokens that transformers' continuous batching writes, at most as many rows at once as our loop has."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    longest = max(request.sampling.max_tokens for request in asked)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=longest)
    rows = ContinuousBatchingConfig(max_requests_per_batch=backend.micro_batch)
    made = 0
    with backend.model.continuous_batching_context_manager(generation_config=config, continuous_batching_config=rows) as manager:
        for request in asked:
            prompt = backend.renderer.render(request.messages or [], generation_role=request.role).token_ids
            manager.add_request(list(prompt), max_new_tokens=request.sampling.max_tokens)
        for _ in asked:
            while (result := manager.get_result(timeout=60)) is None:
                pass
            made += len(result.generated_tokens)
    return made


def with_adapters(model: str, num: int, folder: Path) -> HFBackend:
    """The model with `num` adapters of rank 16 on all linear layers, with random weights."""
    from peft import LoraConfig, get_peft_model

    base = load(model)
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    for number in range(num):
        torch.manual_seed(number)
        get_peft_model(load(model).model, config).save_pretrained(folder / str(number))
    names = {str(number): str(folder / str(number)) for number in range(num)}
    return HFBackend(base.model, base.tokenizer, adapters=names, prefix_gib=0.0)


def load(model: str) -> HFBackend:
    """A model of its own, without a store of keys and values: every round reads its prompts."""
    mark = "&" if "?" in model else "?"
    return HFBackend.from_spec(parse(f"{model}{mark}prefix_gib=0"))


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    rows: list[list[object]] = []

    def add(case: str, ways: Mapping[str, Callable[[], int]], asked: Sequence[Request]) -> None:
        taken = seconds(ways, sum(request.sampling.max_tokens for request in asked), args.repeats)
        first, second = taken.values()
        rows.append([case, *itertools.chain(*((n, f"{s:.1f}") for n, s in taken.items())), f"{second / first:.2f}"])

    backend = load(args.model)
    for case, lengths in LENGTHS.items():
        asked = requests(args.requests, lengths)
        ways = {"our loop": lambda a=asked: written(backend, a), "continuous batching": lambda a=asked: continuous(backend, a)}
        add(f"{args.requests} requests, {case}", ways, asked)
    with tempfile.TemporaryDirectory() as folder:
        backend = with_adapters(args.model, args.adapters, Path(folder))
        for each in args.rows:
            asked = requests(args.adapters * each, (32,), list(map(str, range(args.adapters))))
            ways = {"one batch": lambda a=asked: written(backend, a), "one after the other": lambda a=asked: in_turn(backend, a)}
            add(f"{args.adapters} adapters, {each} requests each", ways, asked)
    text = (
        f"Seconds for the same prompts and the same number of greedy tokens, median of {args.repeats} after a round that is left "
        "out. What the backend does stands first; the ratio is the other way's time over it."
    )
    header = ["case", "way", "s", "other way", "s", "ratio"]
    return Section("Batching on transformers", command_line("hf_batching", parser(), args), header, rows, text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--requests", type=int, default=32)
    made.add_argument("--adapters", type=int, default=4)
    made.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="requests of each adapter")
    made.add_argument("--repeats", type=int, default=1)
    made.add_argument("--model", default="smollm2-135m")
    return made


if __name__ == "__main__":
    section(parser().parse_args()).show()
