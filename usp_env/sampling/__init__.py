"""Who the users are: samplers of profiles.

`load_sampler()` is the packaged bank's, fitted and shipped. `DensitySampler().fit(bank)` fits another.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from usp_env.profiles import ProfileBank
from usp_env.sampling.base import Draw, EpisodeSummary, Sampler
from usp_env.sampling.density import DensitySampler, bank_digest
from usp_env.sampling.diagnostics import Coverage, coverage, local_density_loss, plot, uniformity_loss
from usp_env.sampling.novelty import NoveltyPool, build_pool, novelty_pool

__all__ = [
    "Coverage",
    "DensitySampler",
    "Draw",
    "EpisodeSummary",
    "NoveltyPool",
    "Sampler",
    "build_pool",
    "coverage",
    "load_fitted",
    "load_sampler",
    "local_density_loss",
    "novelty_pool",
    "plot",
    "uniformity_loss",
]


def load_sampler(bank_name: str | Path = "sharegpt", split: str | None = "train") -> DensitySampler:
    """The fitted sampler of a bank.

    The packaged bank's three splits ship fitted (numpy only, loaded once a process). Any other bank is fitted with
    the default settings the first time, and kept in `samplers/` of the cache (`USP_ENV_HOME`).

    Args:
        bank_name: What `ProfileBank.load` takes.
        split: A split, or None for the whole bank. A bank whose profiles name no split is always taken whole.

    Raises:
        MissingAssetError: No such bank; or it has to be fitted and no embedder has been fetched.
        UnknownNameError: The bank has splits, but not this one.
        SpecError: The bank has fewer than 10 profiles.
    """
    if (known := load_fitted(bank_name, split)) is not None:
        return known
    bank, file = _kept(bank_name, split)
    sampler = DensitySampler().fit(bank)
    sampler.save(file)
    return sampler


def load_fitted(bank_name: str | Path = "sharegpt", split: str | None = "train") -> DensitySampler | None:
    """The same where it is fitted already, shipped or in the cache; else None. Nothing is fitted.

    Raises:
        MissingAssetError: No such bank.
        UnknownNameError: The bank has splits, but not this one.

    Example:
        >>> load_fitted("sharegpt", "val").bank
        ProfileBank('sharegpt', 102 profiles)
    """
    if str(bank_name) == "sharegpt" and split is not None:
        return _shipped(split)
    bank, file = _kept(bank_name, split)
    return DensitySampler.load(file, bank) if file.is_file() else None


def _kept(bank_name: str | Path, split: str | None) -> tuple[ProfileBank, Path]:
    """A bank, and where its fitted sampler is kept."""
    bank = ProfileBank.load(bank_name)
    if split is not None and any(profile.split for profile in bank):
        bank = bank.subset(split)
    from usp_env.models import assets

    return bank, assets.home() / "samplers" / f"{bank_digest(bank)}.npz"


@cache
def _shipped(split: str) -> DensitySampler:
    bank = ProfileBank.load("sharegpt", split)
    with resources.as_file(resources.files("usp_env.models") / f"sharegpt-{split}.npz") as file:
        return DensitySampler.load(file, bank)
