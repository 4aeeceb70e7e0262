"""Real vLLM, in a virtual environment of its own: `make test-vllm`. Nothing here is collected without `-m vllm`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# vLLM's worker binds a thread to every core and spins; these tests run beside it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "usp_env" / "backends"))  # the contract


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("-m") != "vllm" else None


def pytest_configure(config: pytest.Config) -> None:
    for line in ("ignore::FutureWarning", "ignore::DeprecationWarning"):
        config.addinivalue_line("filterwarnings", line)  # vLLM's own
