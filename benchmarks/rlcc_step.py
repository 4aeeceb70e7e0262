"""What an update of RLCC costs, part by part; and what it would cost with every utterance as a sample of its own.

    python -m benchmarks.rlcc_step [--dialogues 16] [--turns 5] [--updates 3] [--policy usp-mini-sft] [--assistant SPEC]

One run, two parts. (a) Updates of `training.rlcc` as they are: seconds of rollout, rewards, log-probs and update. (b) The last
rollout again through the update, once as it is (a dialogue is one row) and once as the reference implementation has it: utterance
k of K is a row of its own, with everything before it as context. For equal turns that is (K + 1) / 2 times the tokens.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from agents.rows import Row
from benchmarks.page import Section, command_line
from training import rollouts
from training.rlcc import Rlcc
from training.rlcc_options import parser as training_parser

PARTS = ("rollout_seconds", "reward_seconds", "log_prob_seconds", "update_seconds", "guard_seconds")


def expanded(rows: Sequence[Row], credit: Sequence[Sequence[float]]) -> tuple[list[Row], list[list[float]]]:
    """Each utterance as a sample of its own, everything before it as context.

    Example:
        >>> row = Row((7, 8, 9, 5, 6), (-1, 0, 0, -1, 1), (0.0,) * 5, (False,) * 5)
        >>> [(r.token_ids, r.utterance_ids) for r in expanded([row], [[0.1, 0.2]])[0]]
        [((7, 8, 9), (-1, 0, 0)), ((7, 8, 9, 5, 6), (-1, -1, -1, -1, 0))]
    """
    made: list[Row] = []
    for row in rows:
        for k in range(row.utterances):
            end = max(t for t, index in enumerate(row.utterance_ids) if index == k) + 1
            cut = Row(row.token_ids[:end], row.utterance_ids[:end], row.behaviour[:end], row.banned[:end])
            made.append(cut.only_last())
    return made, [[r] for own in credit for r in own]


def peak_gib() -> float:
    """Most memory that this process (on a GPU: the GPU) has held, GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", str(Path(folder) / "run"), "--policy", args.policy, "--assistant", args.assistant]
        options += ["--dialogues", str(args.dialogues), "--turns", str(args.turns), "--updates", str(args.updates + 1)]
        options += ["--validate-every", "0", "--critic-warmup", "0", "--pool", "500", "--pool-from", "200"]
        run = Rlcc(training_parser(None).parse_args(options))
        records = [run.update(step) for step in range(args.updates + 1)][1:]  # the first one warms up
        specs = rollouts.specs_of(run.pool, args.updates + 1, args.dialogues, 0)
        play = rollouts.roll_out(run.conductor, run.speaker, specs)
        forms = {"a dialogue is a row": (play.rows, play.credit), "an utterance is a row": expanded(play.rows, play.credit)}
        peak = peak_gib()
        taken = {name: update(run, *form, args) for name, form in forms.items()}
    seconds = {part: statistics.median(record[part] for record in records) for part in PARTS}
    rows: list[list[object]] = [[part.removesuffix("_seconds").replace("_", "-"), f"{s:.1f}", ""] for part, s in seconds.items()]
    rows.append(
        ["whole update", f"{sum(seconds.values()):.1f}", f"{statistics.median(r['own_tokens'] for r in records):.0f} own"]
    )
    for name, (spent, tokens) in taken.items():
        rows.append([f"log-probs and update, {name}", f"{spent:.1f}", f"{tokens} ({tokens / spent:.0f}/s, unpadded)"])
    (one, few), (other, many) = taken.values()
    turns = statistics.mean(row.utterances for row in play.rows)
    text = (
        f"Seconds, median of {args.updates} updates of {args.dialogues} dialogues of at most {args.turns} turns, after one that "
        f"is left out; peak memory {peak:.1f} GiB, models of the reward and the assistant included. The last two rows: the same "
        f"recorded rollout ({turns:.1f} utterances a dialogue) in both forms. The reference's has {many / few:.2f} times the "
        f"tokens and takes {other / one:.2f} times as long; (K + 1) / 2 is {(turns + 1) / 2:.2f}."
    )
    return Section("An update of RLCC", command_line("rlcc_step", parser(), args), ["part", "s", "tokens"], rows, text)


def update(run: Rlcc, rows: Sequence[Row], credit: Sequence[Sequence[float]], args: argparse.Namespace) -> tuple[float, int]:
    """Median seconds of log-probs and update, and tokens of the rows."""
    taken = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        run.learner.update(rows, credit, 1, 2)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]), sum(len(row.token_ids) for row in rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dialogues", type=int, default=16)
    made.add_argument("--turns", type=int, default=5)
    made.add_argument("--updates", type=int, default=3)
    made.add_argument("--repeats", type=int, default=1)
    made.add_argument("--policy", default="usp-mini-sft")
    made.add_argument("--assistant", default="smollm2-135m?max_tokens=128")
    return made


if __name__ == "__main__":
    section(parser().parse_args()).show()
