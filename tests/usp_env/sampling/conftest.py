"""A bank of two groups, nine to one, and an embedder that knows which text belongs where."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from usp_env.profiles import Profile, ProfileBank
from usp_env.sampling import DensitySampler


def cluster_embedder(texts: list[str]) -> np.ndarray:
    """Unit vectors (n, 16) around the first axis for cooks, around the second for sailors."""
    out = np.empty((len(texts), 16))
    for row, text in zip(out, texts, strict=True):
        noise = np.random.default_rng(zlib.crc32(text.encode())).normal(scale=0.06, size=16)
        row[:] = np.eye(16)[0 if "cook" in text else 1] + noise
    return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)


def two_trades(n: int, name: str = "two-trades") -> ProfileBank:
    """Every tenth profile is a sailor's."""
    trades = ["sail" if i % 10 == 0 else "cook" for i in range(n)]
    return ProfileBank(
        [Profile(f"{trade}-{i}", f"You {trade} dish {i}.", f"You write {i} words.") for i, trade in enumerate(trades)], name
    )


@pytest.fixture(scope="session")
def embed() -> Callable[[list[str]], np.ndarray]:
    return cluster_embedder


@pytest.fixture(scope="session")
def make_bank() -> Callable[..., ProfileBank]:
    return two_trades


@pytest.fixture(scope="session")
def trades() -> ProfileBank:
    return two_trades(400)


@pytest.fixture(scope="session")
def fitted(trades: ProfileBank) -> DensitySampler:
    """Fitted with real UMAP, once: its import alone takes seconds."""
    if importlib.util.find_spec("umap") is None:  # importorskip would import it, and its import warns
        pytest.skip("needs umap-learn")
    return DensitySampler(embedder=cluster_embedder).fit(trades)
