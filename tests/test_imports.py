"""The import direction, the light import, and the names at the top level."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import usp_env

ROOT = Path(__file__).resolve().parent.parent
# A module may import from its own layer and from the layers before it.
LAYERS = [
    {"errors", "files", "dialogue", "profiles"},
    {"spaces", "endings", "records", "episode", "rendering", "backends"},
    {"models"},
    {"data"},
    {"sampling", "users", "assistants", "extraction"},
    {"rewards", "metrics"},
    {"ledger", "transcripts", "driver", "env", "vector", "aio", "wrappers", "rollout", "replay"},
    {"evaluation"},
    {
        "console",
        "integrations",
        "report",
        "commands",
        "commands_profiles",
        "commands_evaluate",
        "commands_benchmark",
        "chat",
        "cli",
    },
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = ("torch", "transformers", "sklearn", "umap", "openai", "pandas", "matplotlib", "rich", "jinja2", "scipy", "vllm")
# `backends.load` opens a spec and `rewards` opens a scorer when they are asked to: those imports are inside functions.
LAZY_UPWARD = {("backends", "models"), ("errors", "usp_env")}


def imports(file: Path) -> set[str]:
    """First-level modules of `usp_env` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "usp_env":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("usp_env.")}
    return found - {"__version__"}


@pytest.mark.parametrize("file", sorted((ROOT / "usp_env").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    parts = file.relative_to(ROOT / "usp_env").with_suffix("").parts
    if parts == ("__init__",):
        return
    home = parts[0]
    assert home in RANK, f"{home} has no layer"
    for name in imports(file):
        assert RANK[name] <= RANK[home] or (home, name) in LAZY_UPWARD, f"{home} imports {name}"


def test_the_package_knows_nothing_of_agents_and_training() -> None:
    for file in (ROOT / "usp_env").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                text = ast.unparse(node)
                assert not text.startswith(("from agents", "import agents", "from training", "import training")), file


def test_import_is_light() -> None:
    program = f"import sys, json, usp_env; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_first_reset_is_light() -> None:
    program = (
        "import sys, json, gymnasium as gym, usp_env\n"
        "gym.make('usp_env/Assistant-v0', user='scripted', reward=None).reset(seed=0)\n"
        f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_import_costs_little_more_than_gymnasium() -> None:
    def seconds(module: str) -> float:
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            runs.append(time.perf_counter() - start)
        return min(runs)

    seconds("usp_env")  # byte-compile
    assert seconds("usp_env") <= 1.3 * seconds("gymnasium")


def test_the_top_level_names() -> None:
    for name in usp_env.__all__:
        assert getattr(usp_env, name) is not None
    assert set(usp_env.__all__) <= set(dir(usp_env))
    with pytest.raises(AttributeError, match="DialogueEnv"):
        usp_env.DialogEnv  # noqa: B018
