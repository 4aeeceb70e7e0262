"""RLCC in processes of its own: killed at any time, asked to end, and two at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
import rlcc_world  # noqa: E402
from rlcc_world import HERE, files, options, records  # noqa: E402

from training.checkpoints import Checkpoints  # noqa: E402

pytestmark = pytest.mark.assets
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USP_ENV_HOME", "")  # so that it is put back
        patch.delenv("USP_ENV_HOME")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]))
        yield rlcc_world.make(tmp_path_factory.mktemp("rlcc"))


@pytest.fixture(scope="module")
def begin(world):
    """Starts a run in a process that has its imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.rlcc", "rlcc_world"])

    def begin(words: Sequence[str], **variables: str) -> Any:
        home = {"USP_ENV_HOME": str(world / "home")}
        process = context.Process(target=rlcc_world.train, args=(list(words), home | variables))
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def straight(world, begin, tmp_path_factory) -> tuple[Path, float]:
    """A run that nothing happened to, and its seconds."""
    out = tmp_path_factory.mktemp("straight") / "out"
    begin(options(world, out, updates=0)).join()  # the first is the slowest
    start = time.monotonic()
    process = begin(options(world, out.with_name("timed"), validate_every=2))
    process.join()
    assert process.exitcode == 0
    return out.with_name("timed"), time.monotonic() - start


def killed_at(fraction: float, begin, world: Path, straight: tuple[Path, float], out: Path) -> int:
    """Kill a run, look at what is there, go on to the end; the update that it went on after."""
    reference, seconds = straight
    process = begin(options(world, out, validate_every=2))
    process.join(fraction * seconds)
    process.kill()
    process.join()
    done = 0
    if out.is_dir():
        found = Checkpoints(out / "checkpoints").latest()
        done = 0 if found is None else found.state["step"]
        if found is not None:
            for name in found.state["digests"]:
                assert found.tensors(name) or name == "policy_optimizer"  # which is empty after the critic's first update
        metrics = out / "metrics.jsonl"
        whole = [line for line in metrics.read_text("utf-8").splitlines() if line.endswith("}")] if metrics.is_file() else []
        assert done >= max((json.loads(line)["step"] for line in whole), default=0) - 1
    again = begin(options(world, out, validate_every=2, resume=(out / "arguments.json").is_file() or None))
    again.join()
    assert again.exitcode == 0
    assert files(out) == files(reference)
    return done


@pytest.mark.parametrize("k", range(3))
def test_three_kills(world, begin, straight, tmp_path, k) -> None:
    killed_at(np.random.default_rng([0, k]).uniform(0.3, 1.0), begin, world, straight, tmp_path / "out")


@pytest.mark.slow
def test_twenty_kills(world, begin, straight, tmp_path) -> None:
    at = np.random.default_rng(1).uniform(0.0, 1.0, 20)
    done = [killed_at(fraction, begin, world, straight, tmp_path / str(k)) for k, fraction in enumerate(at)]
    assert len(set(done)) >= 3  # they did fall into different updates


def python(*words: object) -> list[str]:
    return [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-m", *map(str, words)]


def test_sigterm_ends_the_program_with_the_command_that_goes_on(world, begin, straight, tmp_path) -> None:
    out = tmp_path / "out"
    words = options(world, out, updates=4, checkpoint_every=9, validate_every=2)
    run = subprocess.Popen(python("training.rlcc", *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if re.match(r"\s+1\s", line):  # the first update's line
            run.send_signal(signal.SIGTERM)
            break
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    *_, why, command = said.splitlines()
    assert why == "SIGTERM"
    done = records(out)[-1]["step"]
    assert 1 <= done < 4
    assert Checkpoints(out / "checkpoints").latest().state["step"] == done
    words = shlex.split(command.removeprefix("to go on: "))
    assert words[:3] == ["python", "-m", "training.rlcc"]
    again = begin(words[3:])
    again.join()
    assert again.exitcode == 0
    reference, _ = straight
    assert records(out) == records(reference)


# ── two processes ────────────────────────────────────────────────────────────────────────────────────


def of_rank(rank: int, port: int) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}


def both(begin, words: Sequence[str], wait: float = 120.0) -> list[int | None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [begin(words, **of_rank(rank, port)) for rank in (0, 1)]
    for process in processes:
        process.join(wait)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def played(out: Path, step: int) -> dict[str, tuple[object, ...]]:
    found = {}
    for file in (out / "dialogues").glob(f"step-{step:06d}*.jsonl"):
        for line in map(json.loads, file.read_text("utf-8").splitlines()):
            said = tuple((m["role"], m["content"], tuple(m.get("token_ids") or ())) for m in line["messages"])
            assert line["episode_id"] not in found
            found[line["episode_id"]] = (line["profile_id"], line["episode_seed"], line["outcome"], tuple(line["rewards"]), said)
    return found


def test_two_processes_play_what_one_plays_and_end_alike(world, begin, straight, tmp_path) -> None:
    out, (reference, _) = tmp_path / "out", straight
    assert both(begin, options(world, out, validate_every=2)) == [0, 0]
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert one
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {file.name for file in (out / "dialogues").iterdir()} == {
        f"step-{step:06d}-{rank}.jsonl" for step in (1, 2, 3, 4) for rank in (0, 1)
    }
    for step in (1, 2):  # the policy has not moved before the second: the critic goes first
        assert played(out, step) == played(reference, step)
    ours, theirs = records(out), records(reference)
    assert [line["step"] for line in ours] == [0, 1, 2, 3, 4]
    for k in (0, 1):
        assert set(ours[k]) == set(theirs[k])
        for key, value in theirs[k].items():
            tolerance = 0.3 if key.startswith(("critic_grad", "value_loss", "value_clip")) else 1e-5  # order of dialogues
            assert (ours[k][key] is None) == (value is None)
            assert value is None or ours[k][key] == pytest.approx(value, rel=tolerance, abs=1e-6)


def test_where_one_process_cannot_write_none_is_left_waiting(world, begin, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").write_text("", "utf-8")
    assert both(begin, options(world, tmp_path / "out"), wait=60) == [0, 0]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"rank-{rank}.pt").startswith("RunDirectoryError: --out")


@pytest.mark.slow
def test_the_launcher(world, begin, straight, tmp_path) -> None:
    out, (reference, _) = tmp_path / "out", straight
    launch = ("accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no")
    words = [sys.executable, "-m", *map(str, launch), "-m", "training.rlcc", *options(world, out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"
    assert played(out, 1) == played(reference, 1)
