"""The commands, as a person types them: scripted speakers, no model."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import usp_env
from usp_env.cli import main

pytest.importorskip("rich")
pytest.importorskip("jinja2")

PLAY = ["play", "--user", "scripted", "--assistant", "scripted", "--reward", "none", "--quiet"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_play_resume_report_show_score_replay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    status, text, _ = run(capsys, *PLAY, "--episodes", "10", "--population", "all", "--out", out)
    assert status == 0
    lines = (tmp_path / "run" / "transcripts.jsonl").read_text("utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    assert len(records) == 10
    assert {r["population"] for r in records} == {"density", "uniform", "majority", "minority", "virtual"}
    assert {r["models"]["assistant"] for r in records} == {"scripted"}

    (tmp_path / "run" / "transcripts.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:50], "utf-8")
    status, text, _ = run(capsys, *PLAY, "--episodes", "10", "--population", "all", "--out", out, "--resume")
    assert status == 0
    assert "7 of 10" in text
    again = [json.loads(line) for line in (tmp_path / "run" / "transcripts.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert sorted(again, key=str) == sorted(records, key=str)

    assert run(capsys, "report", out)[0] == 0
    assert records[0]["episode_id"] in (tmp_path / "run" / "report.html").read_text("utf-8")
    status, text, _ = run(capsys, "show", out, "--episode", records[0]["episode_id"], "--prompts")
    assert status == 0
    assert records[0]["messages"][0]["content"][:20] in text
    assert run(capsys, "show", out)[0] == 0
    assert "10 episodes rerun" in run(capsys, "play", "--replay", out, "--quiet")[1]
    status, text, _ = run(
        capsys, *PLAY, "--replay", out, "--episode", records[0]["episode_id"], "--from-turn", "1", "--out", str(tmp_path / "live")
    )
    assert status == 0
    live = json.loads((tmp_path / "live" / "transcripts.jsonl").read_text("utf-8").split("\n")[0])
    assert live["messages"] == records[0]["messages"]


def test_score_takes_a_function_of_your_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def turns(profile, dialogue):\n    return dialogue.turns or None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run(capsys, *PLAY, "--episodes", "3", "--out", str(tmp_path / "run"))
    status, text, _ = run(
        capsys, "score", str(tmp_path / "run"), "--reward", "2*mine:turns", "--out", str(tmp_path / "scores.jsonl")
    )
    assert status == 0
    assert "3 of 3 scored" in text
    values = [json.loads(line)["value"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert f"mean {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} (sd)" in text  # as the viewers have it
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().split("\n")[:-1]]
    assert all(score["value"] == score["terms"]["turns"] >= 2 for score in scores)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["plya"], "did you mean play?"),
        (["play", "--populaton", "x"], "did you mean --population?"),
        (["play", "--episodes", "0"], "at least 1"),
        ([*PLAY, "--population", "minorty"], "did you mean 'minority'"),
        ([*PLAY[:-3], "--reward", "gaol", "--quiet"], "did you mean 'goal'"),
        (["play", "--user", "scriptd"], "did you mean 'scripted'"),
        (["play", "--user", "scripted:nowhere.jsonl", "--assistant", "scripted", "--reward", "none"], "nowhere.jsonl"),
        (["play", "--user", "usp:no/such-model", "--assistant", "scripted", "--reward", "none"], "no/such-model"),
        ([*PLAY, "--bank", "nowhere"], "nowhere"),
        (["play", "--replay", "nowhere"], "neither"),
        (["play", "--from-turn", "2"], "--replay"),
        ([*PLAY, "--seed", "-1"], "at least 0"),
        ([*PLAY, "--resume"], "--out DIR"),
        ([*PLAY, "--replay", "x", "--out", "y"], "--from-turn"),
        (["profiles", "sample", "--seed", "-1"], "at least 0"),
        (["show", "nowhere"], "neither"),
        (["report", "nowhere"], "nowhere"),
        (["profiles", "show", "nobody"], "unknown profile"),
        (["profiles", "sample", "--split", "tset"], "did you mean 'test'"),
        (["fetch", "smollm"], "did you mean"),
        (["score", "nowhere", "--reward", "goal"], "neither"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str], argv: list[str], error: str) -> None:
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert error in err
    assert "Traceback" not in err


def test_a_taken_directory_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, *PLAY, "--episodes", "1", "--out", str(tmp_path / "run"))
    before = (tmp_path / "run" / "transcripts.jsonl").read_bytes()
    status, _, err = run(capsys, *PLAY, "--episodes", "1", "--out", str(tmp_path / "run"))
    assert status == 2
    assert "--resume" in err
    status, _, err = run(capsys, *PLAY, "--episodes", "1", "--seed", "5", "--out", str(tmp_path / "run"), "--resume")
    assert status == 2
    assert "seed: 0 → 5" in err
    assert (tmp_path / "run" / "transcripts.jsonl").read_bytes() == before


def test_a_run_with_a_line_cut_off_inside_the_file_is_finished_and_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = str(tmp_path / "run"), tmp_path / "run" / "transcripts.jsonl"
    (tmp_path / "lengths.py").write_text("def turns(profile, dialogue):\n    return dialogue.turns\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run(capsys, *PLAY, "--episodes", "3", "--out", out)
    first, second, third = file.read_bytes().split(b"\n")[:-1]
    torn = second[: second.index(b"}") + 1]
    file.write_bytes(b"\n".join([first, torn, third, b""]))
    status, text, _ = run(capsys, *PLAY, "--episodes", "3", "--out", out, "--resume")
    assert (status, "2 of 3" in text) == (0, True)
    assert file.read_bytes() == b"\n".join([first, b" " * len(torn), third, second, b""])
    for command in (["report", out], ["show", out], ["score", out, "--reward", "lengths:turns"]):
        assert run(capsys, *command)[0] == 0
    assert "3 episodes rerun" in run(capsys, "play", "--replay", out, "--quiet")[1]


def test_check_and_profiles(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, text, _ = run(capsys, "check")
    assert status == 0
    assert text.count("check_env passed") == 2
    status, text, _ = run(capsys, "profiles", "sample", "-n", "3", "--population", "virtual", "--out", str(tmp_path / "p.jsonl"))
    assert status == 0
    assert text.count("virtual:") == 3
    assert "1537" in run(capsys, "profiles", "show")[1]
    assert "· Ask" in run(capsys, "profiles", "show", "8JdIMAk_0")[1]


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m usp_env.cli profiles sample -n 400 | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_version_and_mistakes_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"usp-env {usp_env.__version__}\n"
    for argv, told in (
        (["play", "--episodes", "x"], "expected a whole number of at least 1, got 'x'"),
        (["evaluate", "--user", "u", "--out", "o", "--turns", "ten"], "expected a whole number of at least 1, got 'ten'"),
        (["benchmark", "--out", "o", "--seed", "x"], "expected a whole number of at least 0, got 'x'"),
        (["benchmark", "--out", "o", "--turns", "0"], "expected at least 1, got 0"),
        (["show", "runs/x", "--overwrite"], "unrecognized arguments: --overwrite\n"),  # another command's option: no advice
        (["show", "runs/x", "--epsode", "a"], "did you mean --episode?"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        assert told in capsys.readouterr().err
