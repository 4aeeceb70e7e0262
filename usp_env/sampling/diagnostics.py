"""What a sample of users looks like against its population: LDL, uniformity, coverage, the density plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from usp_env.errors import SpecError, require
from usp_env.profiles import Profile
from usp_env.sampling.kde import FloatArray, squared_distances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from usp_env.sampling.density import DensitySampler

_CHUNK = 1024
# Colour-blind safe (Okabe and Ito) and told apart by shape too.
_MARKS = {
    "density": ("o", "#0072B2"),
    "uniform": ("s", "#555555"),
    "majority": ("^", "#D55E00"),
    "minority": ("v", "#009E73"),
    "virtual": ("D", "#CC79A7"),
}


def local_density_loss(embeddings: FloatArray, k: int = 50) -> float:
    """LDL: mean over the points of the mean Euclidean distance to their `k` nearest others. Lower is denser.

    After the paper's Figure 5, in the space of the embeddings (its script leaves them as the encoder gives them;
    ours have norm 1, so compare LDL within one embedder only).

    Args:
        embeddings: (n, d), n > k.
        k: Neighbours, the point itself not counted; two equal points count, at distance 0.

    Raises:
        SpecError: n <= k.

    Example:
        >>> local_density_loss(np.array([[0.0], [1.0], [3.0]]), k=1)  # (1 + 1 + 2) / 3
        1.3333333333333333
    """
    x = np.asarray(embeddings, np.float64)
    if not 1 <= k < len(x):
        raise SpecError(f"expected more than k = {k} embeddings, k >= 1, got {len(x)}")
    return float(_to_others(x, k).mean())


def _to_others(x: FloatArray, k: int) -> FloatArray:
    """Distances (n, k) from each row to its k nearest other rows."""
    out = np.empty((len(x), k))
    for start in range(0, len(x), _CHUNK):
        squared = squared_distances(x[start : start + _CHUNK], x)
        squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf
        out[start : start + _CHUNK] = np.sqrt(np.partition(squared, k - 1, axis=1)[:, :k])
    return out


def uniformity_loss(embeddings: FloatArray, t: float = 2.0) -> float:
    """Log of the mean Gaussian potential over pairs: log mean_{x != y} exp(-t |x - y|^2). Lower is more spread out.

    Wang & Isola (2020), eq. 2, for unit vectors; 0 when all points are equal.

    Args:
        embeddings: (n, d), n >= 2.
        t: Scale.

    Raises:
        SpecError: Fewer than 2 embeddings.

    Example:
        >>> round(uniformity_loss(np.array([[1.0, 0.0], [0.0, 1.0]])), 6)  # one pair, squared distance 2
        -4.0
    """
    x = np.asarray(embeddings, np.float64)
    if len(x) < 2:
        raise SpecError(f"expected at least 2 embeddings, got {len(x)}")
    highest, total = -np.inf, 0.0  # log-sum-exp, block by block: with large t all terms may underflow
    for start in range(0, len(x), _CHUNK):
        exponents = -t * squared_distances(x[start : start + _CHUNK], x)
        exponents[np.arange(len(exponents)), start + np.arange(len(exponents))] = -np.inf
        peak = max(highest, float(exponents.max()))
        total = total * np.exp(highest - peak) + np.exp(exponents - peak).sum()
        highest = peak
    return float(highest + np.log(total) - np.log(len(x) * (len(x) - 1)))


class Coverage(NamedTuple):
    """How much of a population a sample reaches.

    Attributes:
        strata: Share of the density strata that hold at least one sampled profile.
        profiles: Share of the bank's profiles that were sampled.
        profiles_by_stratum: The same within each stratum, from the thinnest to the densest.
        sample_by_stratum: Share of the sample that falls into each stratum; sums to 1.
    """

    strata: float
    profiles: float
    profiles_by_stratum: tuple[float, ...]
    sample_by_stratum: tuple[float, ...]


def coverage(sampler: DensitySampler, profiles: Sequence[Profile], n_strata: int = 10) -> Coverage:
    """Coverage of the bank by a sample, by strata of equal size along the bank's density (10: its deciles).

    A profile that is not in the bank (a virtual one) counts to the stratum of its own density, and as no bank profile.

    Args:
        sampler: Fitted.
        profiles: The sample, with repetitions.
        n_strata: How many strata.

    Raises:
        SpecError: No profiles, or more strata than bank profiles.
    """
    bank = sampler.bank
    if not profiles or not 1 <= n_strata <= len(bank):
        raise SpecError(f"expected a sample and 1 to {len(bank)} strata, got {len(profiles)} profiles and {n_strata} strata")
    ranked = np.sort(sampler.log_density_)
    ends = np.array([ranked[len(bank) * i // n_strata] for i in range(1, n_strata)])
    bank_strata = np.searchsorted(ends, sampler.log_density_, side="right")
    sample_strata = np.bincount(np.searchsorted(ends, sampler.score(profiles), side="right"), minlength=n_strata)
    drawn = {profile.id for profile in profiles}
    hit = np.array([profile.id in drawn for profile in bank])
    return Coverage(
        strata=float((sample_strata > 0).mean()),
        profiles=float(hit.mean()),
        profiles_by_stratum=tuple(
            float(hit[bank_strata == i].mean()) if (bank_strata == i).any() else 0.0 for i in range(n_strata)
        ),
        sample_by_stratum=tuple(float(share) for share in sample_strata / len(profiles)),
    )


def plot(
    sampler: DensitySampler, profiles: Mapping[str, Sequence[Profile]] | None = None, path: str | Path | None = None
) -> Figure:
    """Map of the population: density over the layout, the bank as dots, samples marked by population.

    Args:
        sampler: Fitted, with 2 components.
        profiles: Population to its sample; None draws 40 profiles of each population of real profiles (generator seeded
            with 0). Virtual profiles have to be embedded to find their place, so they are shown only when passed.
        path: Where to save it (suffix gives the format); None saves nothing.

    Returns:
        The figure; no global state of matplotlib is touched.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SpecError: The sampler has not 2 components.
    """
    if sampler.n_components != 2:
        raise SpecError(f"expected a sampler with n_components=2, got {sampler.n_components}")
    figure_module = require("matplotlib.figure", "report")
    if profiles is None:
        rng = np.random.default_rng(0)
        profiles = {
            population: sampler.sample(40, population, rng) for population in sampler.populations if population != "virtual"
        }
    figure: Figure = figure_module.Figure(figsize=(8, 7), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw_density(figure, axes, sampler)
    for population, sample in profiles.items():
        marker, colour = _MARKS.get(population, ("P", "black"))
        xy = sampler.locate(sample)
        axes.scatter(
            xy[:, 0], xy[:, 1], s=38, marker=marker, c=colour, edgecolors="white", linewidths=0.8, label=population, zorder=3
        )
    names = [f"{sampler.layout_.upper()} {i}" for i in (1, 2)]
    axes.set(title=f"Bank {sampler.bank.name!r}: {len(sampler.bank)} profiles", xlabel=names[0], ylabel=names[1])
    figure.legend(loc="outside lower center", ncols=5, frameon=False, handletextpad=0.2)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def density_grid(sampler: DensitySampler, n: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The density over the whole map, to where it has faded.

    Args:
        sampler: Fitted, with 2 components.
        n: Points in each direction.

    Returns:
        x (n,) and y (n,), ascending, and the log density (n, n), a row for each y.
    """
    points = sampler.coordinates_.astype(np.float64)
    margin = 3 * np.sqrt(np.diag(sampler.covariance_))
    low, high = points.min(axis=0) - margin, points.max(axis=0) + margin
    x, y = np.linspace(low[0], high[0], n), np.linspace(low[1], high[1], n)
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    return x, y, sampler.log_density(grid.reshape(-1, 2)).reshape(n, n)


def _draw_density(figure: Figure, axes: Any, sampler: DensitySampler) -> None:
    points = sampler.coordinates_
    x, y, log_density = density_grid(sampler, 160)
    density = np.exp(log_density)
    # Grey below the coloured marks, and never so dark that the bank's dots drown in it.
    filled = axes.contourf(x, y, density, levels=14, cmap="Greys", vmin=0, vmax=1.8 * density.max())
    axes.contour(x, y, density, levels=filled.levels[1:], colors="white", linewidths=0.6)
    axes.set_aspect("equal", adjustable="datalim")
    axes.scatter(points[:, 0], points[:, 1], s=4, c="black", alpha=0.45, linewidths=0, label="bank")
    figure.colorbar(filled, ax=axes, label="density", pad=0.01, fraction=0.04, aspect=30)
