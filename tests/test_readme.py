"""The README tells the truth: its tree, its commands, its code."""

from __future__ import annotations

import asyncio
import re
import subprocess
from pathlib import Path

import pytest

import usp_env
from usp_env.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def tree() -> set[str]:
    """Files that the README's tree lists, as paths."""
    block = README.split("## What is here")[1].split("```")[1]
    found, folder = set(), ""
    for line in block.strip("\n").split("\n"):
        if re.fullmatch(r"[\w/]+/", line.strip()):
            folder = line.strip()
        elif line.startswith("  "):
            found.add(folder + line.split()[0])
    return found


def test_the_tree_lists_every_file_and_no_other() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout")
    folders = ("usp_env/", "agents/", "training/", "examples/", "benchmarks/")
    assert tree() == {name for name in done.stdout.split() if name.startswith(folders)}


def test_the_commands_exist() -> None:
    parser = build_parser()
    for line in re.findall(r"^usp-env (.+?)\s*(?:#.*)?$", README, re.MULTILINE):
        if "|" not in line and "ID" not in line:
            assert parser.parse_args(line.split()).command == line.split()[0]


def test_the_twenty_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API block as it stands, with scripted speakers in the models' place."""
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    code = block.replace("usp-mini", "scripted").replace("smollm2-135m", "scripted").replace("goal+0.1*short", "0.1*short")
    names: dict[str, object] = {}
    exec(compile(code.replace('user="scripted")', 'user="scripted", reward=None)'), "README.md", "exec"), names)
    assert len(names["branches"]) == 8
    assert names["weights"].shape == (8,)


def test_the_event_loop_lines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = block.replace("usp-mini", "scripted").replace('reward="goal"', "reward=None")
    body = "\n".join(f"    {line}" for line in code.splitlines())
    names: dict[str, object] = {"spec": usp_env.make_specs(1)[0]}
    exec(compile(f"async def main():\n{body}\n    return observation", "README.md", "exec"), names)
    assert len(asyncio.run(names["main"]())) >= 2
