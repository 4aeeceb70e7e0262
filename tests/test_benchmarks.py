"""The commands on the benchmarks' page: each measures again what stands there."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import env_overhead, evaluate_growth, novelty, real_servers, side_by_side
from benchmarks.page import Section, command_line

PYTHON = "PATH-TO-PYTHON"


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("novelty", "", ""),
        ("env_overhead", "--latency 1.0 --steps 22", ""),
        ("env_overhead", "--steps 4 --num-envs 2 8", "--num-envs 2 8 --steps 4"),
        ("multi_turn", "--model 'smollm2-135m?lanes=2'", "--model 'smollm2-135m?lanes=2'"),
        ("side_by_side", "--tau2-python elsewhere/tau2/bin/python", f"--tau2-python {PYTHON}"),
        ("real_servers", "--server transformers --lanes 8", "--server transformers --lanes 8"),
        ("evaluate_growth", "--people 5 10", "--people 5 10"),
        ("rollout_throughput", "--skip-loop --turns=2", "--turns 2 --skip-loop"),
    ],
)
def test_a_command_names_the_options_that_are_no_defaults(name: str, options: str, shown: str) -> None:
    parser = importlib.import_module(f"benchmarks.{name}").parser()
    args = parser.parse_args(shlex.split(options))
    line = command_line(name, parser, args)
    assert line == f"python -m benchmarks.{name} {shown}".strip()
    again = parser.parse_args(shlex.split(line)[3:])
    assert {k: v for k, v in vars(again).items() if v != PYTHON} == {
        k: v for k, v in vars(args).items() if "elsewhere" not in str(v)
    }


def section(module: Any, options: str) -> Section:
    made = module.section(module.parser().parse_args(options.split()))
    assert isinstance(made, Section)
    return made


def test_sections_tell_the_command_that_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_servers, "measure", lambda args, folder: [])
    options = "--server transformers --server-python elsewhere/bin/python --lanes 8"
    server = section(real_servers, options)
    assert "8 at a time" in server.text
    assert server.command == f"python -m benchmarks.real_servers {options.replace('elsewhere/bin/python', PYTHON)}"

    monkeypatch.setattr(env_overhead, "overhead", lambda *args: 1.0)
    monkeypatch.setattr(env_overhead, "share_of_ideal", lambda *args: 1.0)
    assert section(env_overhead, "--num-envs 2").command == "python -m benchmarks.env_overhead --num-envs 2"

    rate = side_by_side.Rate([1.0], 1)
    monkeypatch.setattr(side_by_side, "server", lambda latency: nullcontext(("", [0, 0, 0])))
    monkeypatch.setattr(side_by_side, "ours", lambda *args: rate)
    monkeypatch.setattr(side_by_side, "tau2", lambda *args: (rate, 0))
    beside = section(side_by_side, "--num 4 --tau2-python elsewhere/bin/python")
    assert beside.command == f"python -m benchmarks.side_by_side --num 4 --tau2-python {PYTHON}"

    result = json.dumps({"seconds": [1.0], "peak": 1, "error": 0.0})
    monkeypatch.setattr(novelty.subprocess, "run", lambda *args, **more: SimpleNamespace(stdout=result))
    assert section(novelty, "--m 10").command == "python -m benchmarks.novelty --m 10"


def test_a_cost_need_not_count_every_kind_of_token() -> None:
    """A ledger leaves out what no engine counted: a scripted assistant has replies and seconds alone."""
    user = {"replies": 2, "seconds": 4.0, "prompt_tokens": 100, "cached_tokens": 30, "completion_tokens": 7}
    bare = {"replies": 2, "seconds": 0.5}
    server = {"replies": 1, "seconds": 1.0, "prompt_tokens": 10, "cached_tokens": None, "completion_tokens": 5}
    cost = {
        "users": {"a": {"utterance": {"user": server}, "conversation": {"user": user, "assistant": bare}}},
        "scoring_seconds": 3.0,
    }
    assert evaluate_growth.took(9.0, 4, cost) == (4, 9.0, 5.5, 3.0, 80, 12)


def test_people_are_those_that_were_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[Any], **options: Any) -> None:
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        asked = int(command[command.index("-n") + 1])
        (folder / "card.json").write_text(json.dumps({"users": {}, "people": {"n": min(asked, 40), "of": 40}}), "utf-8")
        (folder / "cost.json").write_text(json.dumps({"users": {}, "scoring_seconds": 1.0}), "utf-8")

    monkeypatch.setattr(evaluate_growth.subprocess, "run", run)
    made = section(evaluate_growth, "--people 20 60")
    assert [row[0] for row in made.rows] == [20, 40]


def test_growth_tells_what_does_not_grow() -> None:
    def runs(seconds: Sequence[float]) -> list[evaluate_growth.Took]:
        return [evaluate_growth.Took(n, s, 0, 0, 0, 0) for n, s in zip((20, 10, 40), seconds, strict=False)]

    told = "a further person takes 2.00 s from 10 to 20, 2.00 s from 20 to 40."
    assert evaluate_growth.growth(runs((70, 50, 110))) == f"A line through the runs: 30 s and 2.00 s a person; {told} "
    squares = evaluate_growth.growth(runs((140, 110, 260)))  # 100 + n²/10, whose line is 50 + 36 n / 7
    assert "50 s and 5.14 s a person; a further person takes 3.00 s from 10 to 20, 6.00 s from 20 to 40." in squares
    assert evaluate_growth.growth(runs((50,))) == ""


def test_the_peak_of_a_benchmark_is_its_own() -> None:
    ballast = np.ones(40_000_000)  # 320 MB of the parent's
    code = "from benchmarks.novelty import peak_bytes; print(peak_bytes())"
    ours = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert ours < 320e6
    assert ballast.sum() == 4e7
    assert novelty.peak_bytes() > 320e6


@pytest.mark.parametrize(("hangs", "expected"), [(0, ([1.0, 2.0], 0)), (2, ([1.0, 2.0], 2)), (3, (None, 3))])
def test_a_run_of_another_environment_that_hangs_or_fails_is_begun_again(
    monkeypatch: pytest.MonkeyPatch, hangs: int, expected: Any
) -> None:
    left = [hangs]
    counts = [0, 0, 0]

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        left[0] -= 1
        counts[0] += 6  # calls that the server saw: two of each repetition
        if left[0] == 2:
            counts[0] -= 1  # a step without its call
        elif left[0] >= 0:
            raise (subprocess.TimeoutExpired if left[0] else subprocess.CalledProcessError)(1, command)
        return SimpleNamespace(stdout="[9.0, 1.0, 2.0]\n")

    monkeypatch.setattr(side_by_side.subprocess, "run", run)
    rate, failed = side_by_side.tau2("python", "url", counts, num=1, turns=1, repeats=2)
    assert (rate and rate.seconds, failed) == expected


def test_calls_that_another_client_made_again_are_counted_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0, 0, 0]

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        counts[0] += 8
        return SimpleNamespace(stdout="[9.0, 1.0, 2.0]\n")

    monkeypatch.setattr(side_by_side.subprocess, "run", run)
    assert side_by_side.tau2("python", "url", counts, num=1, turns=1, repeats=2) == (side_by_side.Rate([1.0, 2.0], 0, 2), 0)
