"""Fit the samplers that ship: one `usp_env/models/sharegpt-<split>.npz` for each split of the packaged bank.

    python -m training.fit_samplers            # about a minute on 2 cores; needs `usp-env fetch minilm` and umap-learn
    python -m training.fit_samplers --check    # fit nothing: print the figures of the files that are there

The figures it prints are those of `usp_env/models/SAMPLERS.md`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import usp_env.models
from usp_env.profiles import SPLITS, ProfileBank
from usp_env.sampling import DensitySampler, coverage, local_density_loss, uniformity_loss

FOLDER = Path(usp_env.models.__file__).parent
EMBEDDER = "minilm"  # not "auto": what ships must not depend on what lies in the cache of whoever runs this
SUBSETS = ("majority", "uniform", "minority")


def subset_rows(sampler: DensitySampler, repeats: int = 20) -> list[str]:
    """One Markdown row a population: size, mean log density, LDL (k=10), uniformity loss.

    `uniform` is a random tenth of the bank, so that all three have the same size; its figures are means over `repeats` tenths.
    """
    position = {profile.id: i for i, profile in enumerate(sampler.bank)}
    members = {p: np.array([position[profile.id] for profile in sampler.members(p)]) for p in SUBSETS}
    rng = np.random.default_rng(0)
    tenths = [rng.choice(members["uniform"], len(members["majority"]), replace=False) for _ in range(repeats)]
    return [_row(sampler, p, tenths if p == "uniform" else [members[p]]) for p in SUBSETS]


def _row(sampler: DensitySampler, population: str, subsets: list[np.ndarray]) -> str:
    density = np.mean([sampler.log_density_[subset].mean() for subset in subsets])
    ldl = np.mean([local_density_loss(sampler.embeddings_[subset], k=10) for subset in subsets])
    uniformity = np.mean([uniformity_loss(sampler.embeddings_[subset]) for subset in subsets])
    return f"| {population} | {len(subsets[0])} | {density:.2f} | {ldl:.3f} | {uniformity:.3f} |"


def coverage_row(sampler: DensitySampler, population: str, n: int = 1000) -> str:
    """One Markdown row: what 1,000 draws of a population reach."""
    reached = coverage(sampler, sampler.sample(n, population, np.random.default_rng(0)))
    shares = " ".join(f"{100 * share:.1f}" for share in reached.sample_by_stratum)
    return f"| {population} | {100 * reached.strata:.0f} | {100 * reached.profiles:.1f} | {shares} |"


def main() -> None:
    """Fit, save and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fit nothing, print the figures of the shipped files")
    check = parser.parse_args().check
    for split in SPLITS:
        bank, file = ProfileBank.load("sharegpt", split), FOLDER / f"sharegpt-{split}.npz"
        start = time.perf_counter()
        if not check:
            DensitySampler(embedder=EMBEDDER).fit(bank).save(file)
        sampler = DensitySampler.load(file, bank)
        print(f"{split}: {len(bank)} profiles, {file.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - start:.1f} s")
        print(f"digest {sampler.digest}\n| subset | n | mean log density | LDL | uniformity |", *subset_rows(sampler), sep="\n")
        if split == "train":
            print("| population | strata | profiles | % of the draws by decile, thinnest first |")
            print(*(coverage_row(sampler, p) for p in ("density", "uniform", "majority", "minority")), sep="\n")


if __name__ == "__main__":
    main()
