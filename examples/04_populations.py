"""Who are the users? Draw from each population of the shipped bank, describe the draws, map them.

    python examples/04_populations.py                      # needs `usp-env fetch minilm`, torch, transformers and matplotlib
    python examples/04_populations.py --seed 3 --out map.png

The real populations need numpy alone; virtual profiles are new texts and have to be embedded to find their density.
"""

import argparse
import re

import numpy as np

from usp_env.models import embedders
from usp_env.sampling import coverage, load_sampler, local_density_loss, plot, uniformity_loss

N = 100


def first_sentence(text: str, width: int = 96) -> str:
    """The first sentence, cut to `width` characters."""
    sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return sentence if len(sentence) <= width else sentence[: width - 1] + "…"


def main() -> None:
    """Print three people of each population, its figures, and save the map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/populations.png")
    args = parser.parse_args()

    sampler = load_sampler("sharegpt", "train")
    embed = embedders.load(sampler.embedder_name_)
    rng = np.random.default_rng(args.seed)
    samples = {population: sampler.sample(N, population, rng) for population in sampler.populations}
    rows = []
    for population, profiles in samples.items():
        print(f"\n{population}")
        for profile, density in zip(profiles[:3], sampler.score(profiles[:3]), strict=True):
            print(f"  {profile.id:<34} log density {density:5.2f}  {first_sentence(profile.objective)}")
            print(f"  {'':<34} {'':<17}  {first_sentence(profile.subjective)}")
        # Each person once: a small population is drawn from repeatedly, and copies have distance 0.
        x = embed(sorted({str(profile) for profile in profiles}))
        reached = coverage(sampler, profiles)
        rows.append((population, len(x), local_density_loss(x, k=10), uniformity_loss(x), 100 * reached.strata))

    print(f"\n{N} draws of each: different people, LDL (k=10, low: dense), uniformity loss (low: spread out), deciles reached")
    for population, n, ldl, uniformity, strata in rows:
        print(f"  {population:<9} {n:4d}  LDL {ldl:.3f}  uniformity {uniformity:6.3f}  {strata:3.0f} %")
    plot(sampler, {population: profiles[:40] for population, profiles in samples.items() if population != "uniform"}, args.out)
    print(f"\nmap of the population: {args.out}")


if __name__ == "__main__":
    main()
