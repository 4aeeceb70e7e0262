"""What `usp-env evaluate` takes, and how that grows with the number of people.

    python -m benchmarks.evaluate_growth [--user usp-mini] [--people 15 30 60] [--turns 3] [--most 3]

Each run is the command itself, in a process of its own. Some of its time is the same for any number of people: loading,
embedding the whole split for ADV's plane, bootstraps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.page import Section, command_line
from usp_env.evaluation.card import COST, read_card


class Took(NamedTuple):
    """People and seconds of one run: all of it, models speaking, scoring; and tokens read (kept ones apart) and written."""

    people: int
    all: float
    speaking: float
    scoring: float
    read: int
    written: int


def run(people: int, args: argparse.Namespace) -> Took:
    """Evaluate so many people of `val`."""
    program = Path(sys.executable).with_name("usp-env")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "card")
        words = ["--user", args.user, "--split", "val", "-n", people, "--turns", args.turns, "--most", args.most, "--out", out]
        start = time.perf_counter()
        subprocess.run([program, "evaluate", *map(str, words), "--quiet"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        return took(seconds, read_card(out)["people"]["n"], json.loads((out / COST).read_text("utf-8")))


def took(seconds: float, people: int, cost: dict[str, Any]) -> Took:
    """Out of the run's `cost.json`, which leaves out kinds of tokens that no engine counted.

    Example:
        >>> took(9.0, 2, {"users": {"a": {"utterance": {"user": {"seconds": 4.0, "prompt_tokens": 7}}}}, "scoring_seconds": 3.0})
        Took(people=2, all=9.0, speaking=4.0, scoring=3.0, read=7, written=0)
    """
    accounts = [one for levels in cost["users"].values() for roles in levels.values() for one in roles.values()]
    read, kept, written = (
        sum(one.get(kind) or 0 for one in accounts) for kind in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    return Took(people, seconds, sum(one["seconds"] for one in accounts), cost["scoring_seconds"], read - kept, written)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--user", default="usp-mini")
    made.add_argument("--people", type=int, nargs="+", default=[15, 30, 60], help="sizes; at most the split's")
    made.add_argument("--turns", type=int, default=3, help="most user turns of a conversation")
    made.add_argument("--most", type=int, default=3, help="turns of a person at the utterance level")
    return made


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    runs = [run(people, args) for people in args.people]
    rows = [
        [
            t.people,
            *(f"{seconds:.0f}" for seconds in (t.all, t.speaking, t.scoring)),
            f"{t.all / t.people:.2f}",
            t.read,
            t.written,
        ]
        for t in runs
    ]
    command = f"usp-env evaluate --user {args.user} --split val -n N --turns {args.turns} --most {args.most}"
    text = (
        f"`{command}`: both levels, the packaged assistant, all scorers and their twins. {growth(runs)}Tokens read are without "
        "those whose keys and values were kept."
    )
    header = ["people", "seconds", "models speaking", "scoring", "seconds a person", "tokens read", "written"]
    return Section("Evaluating a simulated user", command_line("evaluate_growth", parser(), args), header, rows, text)


def growth(runs: Sequence[Took]) -> str:
    """How the time grows: a line through the runs, and what a further person takes between one size and the next.

    The line's foot is what does not grow. Where growth is no line, the steps differ; no foot that was fitted can hide it.

    Example:
        >>> growth([Took(n, 30 + 2 * n, 0, 0, 0, 0) for n in (15, 30)])
        'A line through the runs: 30 s and 2.00 s a person; a further person takes 2.00 s from 15 to 30. '
    """
    if len({took.people for took in runs}) < 2:
        return ""
    each, fixed = np.polyfit([took.people for took in runs], [took.all for took in runs], 1)
    steps = [
        f"{(b.all - a.all) / (b.people - a.people):.2f} s from {a.people} to {b.people}"
        for a, b in pairwise(sorted(runs))
        if b.people > a.people
    ]
    return f"A line through the runs: {fixed:.0f} s and {each:.2f} s a person; a further person takes {', '.join(steps)}. "


if __name__ == "__main__":
    section(parser().parse_args()).show()
