"""What `usp-env evaluate` takes, and how that grows with the number of people.

    python -m benchmarks.evaluate_growth [--user usp-mini] [--people 15 30 60] [--turns 3] [--most 3]

Each run is the command itself, in a process of its own. Loading is all that is left of its time when generating and scoring are
taken away.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.page import Section, command_line
from usp_env.evaluation.card import COST


class Took(NamedTuple):
    """Seconds of one run: all of it, models speaking, scoring; and the tokens that were read (kept ones apart) and written."""

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
        return took(time.perf_counter() - start, json.loads((out / COST).read_text("utf-8")))


def took(seconds: float, cost: dict[str, Any]) -> Took:
    """Out of the run's `cost.json`."""
    accounts = [one for levels in cost["users"].values() for roles in levels.values() for one in roles.values()]
    read = sum(one["prompt_tokens"] - (one["cached_tokens"] or 0) for one in accounts)
    written = sum(one["completion_tokens"] for one in accounts)
    return Took(seconds, sum(one["seconds"] for one in accounts), cost["scoring_seconds"], read, written)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--user", default="usp-mini")
    made.add_argument("--people", type=int, nargs="+", default=[15, 30, 60])
    made.add_argument("--turns", type=int, default=3, help="most user turns of a conversation")
    made.add_argument("--most", type=int, default=3, help="turns of a person at the utterance level")
    return made


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    runs = {people: run(people, args) for people in args.people}
    rows = [
        [n, *(f"{seconds:.0f}" for seconds in (t.all, t.speaking, t.scoring)), f"{t.all / n:.2f}", t.read, t.written]
        for n, t in runs.items()
    ]
    command = f"usp-env evaluate --user {args.user} --split val -n N --turns {args.turns} --most {args.most}"
    text = (
        f"`{command}`: both levels, the packaged assistant, all scorers and their twins. {growth(runs)}Tokens read are without "
        "those whose keys and values were kept."
    )
    header = ["people", "seconds", "models speaking", "scoring", "seconds a person", "tokens read", "written"]
    return Section("Evaluating a simulated user", command_line("evaluate_growth", parser(), args), header, rows, text)


def growth(runs: dict[int, Took]) -> str:
    """How the time grows: the exponent of a power of the number of people, what does not grow (loading) taken away.

    Example:
        >>> growth({10: Took(30, 15, 5, 0, 0), 20: Took(50, 30, 10, 0, 0)})
        'Speaking and scoring grow with the number of people to the power of 1.00. '
    """
    if len(runs) < 2:
        return ""
    people = np.log([float(n) for n in runs])
    seconds = np.log([took.speaking + took.scoring for took in runs.values()])
    return f"Speaking and scoring grow with the number of people to the power of {np.polyfit(people, seconds, 1)[0]:.2f}. "


if __name__ == "__main__":
    section(parser().parse_args()).show()
