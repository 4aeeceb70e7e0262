"""Who the users are: profiles drawn by the density of the real population (paper §4.4).

Profiles are embedded, laid out by UMAP and given a Gaussian kernel density. UMAP and the embedder are needed to fit and
to place new profiles; a fitted sampler loads and draws with numpy alone.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError, UnknownNameError
from usp_env.profiles import Profile, ProfileBank
from usp_env.sampling import store
from usp_env.sampling.base import Draw, EpisodeSummary
from usp_env.sampling.kde import FloatArray, GaussianKDE, nearest
from usp_env.sampling.layout import pca_layout, umap_layout
from usp_env.sampling.virtual import join_neighbours

POPULATIONS = ("density", "uniform", "majority", "minority", "virtual")
MIN_PROFILES = 10
MIN_PROFILES_UMAP = 30
PLACING_NEIGHBOURS = 15
CALLABLE = "callable:"

EmbedderLike = str | Callable[[list[str]], Any]


class DensitySampler:
    """Draws profiles from five populations of a bank. Implements `usp_env.sampling.base.Sampler`.

    | population | who |
    |---|---|
    | `density` | the real profile nearest to a point drawn from the density: keeps the population's proportions |
    | `uniform` | each profile equally |
    | `majority`, `minority` | each equally among the tenth of the profiles where the density is highest, lowest |
    | `virtual` | a point from the density; OF of its nearest profile, SC of its second nearest |

    Args:
        embedder: A name for `usp_env.models.embedders.load`, or a callable `list[str] -> (n, d)`.
        n_components: Dimensions of the layout. 2 keeps density; in 5 the densest tenth of a 9:1 bank is all minority.
        random_state: Seed of UMAP.

    Attributes:
        bank_: The bank it was fitted on (also `bank`).
        embedder_name_: Which embedder was used.
        layout_: `"umap"` or `"pca"`.
        embeddings_: (n, d) of `str(profile)`.
        coordinates_: (n, n_components) float32.
        log_density_: (n,) log density of each profile.
        bandwidth_: Scott's factor.
        covariance_: (n_components, n_components) of one kernel.

    Example:
        >>> from usp_env.sampling import load_sampler
        >>> sampler = load_sampler("sharegpt", "train")
        >>> [profile] = sampler.sample(1, "minority", np.random.default_rng(0))
        >>> bool(sampler.score([profile])[0] < np.median(sampler.log_density_))
        True
    """

    populations: Sequence[str] = POPULATIONS

    def __init__(self, embedder: EmbedderLike = "auto", n_components: int = 2, random_state: int = 0) -> None:
        self.embedder = embedder
        self.n_components = n_components
        self.random_state = random_state

    def fit(self, bank: ProfileBank) -> DensitySampler:
        """Learn the density of a bank.

        Raises:
            SpecError: The bank has fewer than 10 profiles, or the embedder returns something else than (n, d) finite numbers.
            MissingExtraError: umap-learn is not installed (30 profiles or more).
        """
        if len(bank) < MIN_PROFILES:
            raise SpecError(
                f"expected a bank of at least {MIN_PROFILES} profiles, got {len(bank)}: draw them with your own sampler"
            )
        embed = _resolve(self.embedder)
        embeddings = _compact(_checked(embed([str(profile) for profile in bank]), len(bank)))
        umap_from = max(MIN_PROFILES_UMAP, 4 * self.n_components + 1)
        if len(bank) < umap_from:
            warnings.warn(
                f"{len(bank)} profiles are too few for UMAP (from {umap_from}): laid out with PCA instead", stacklevel=2
            )
            layout, coordinates = "pca", pca_layout(embeddings, self.n_components)
        else:
            layout, coordinates = "umap", umap_layout(embeddings, self.n_components, self.random_state)
        return self._set(bank, _name(embed), layout, embeddings, coordinates)

    def _set(self, bank: ProfileBank, name: str, layout: str, embeddings: FloatArray, coordinates: FloatArray) -> DensitySampler:
        self.bank_ = bank
        self.embedder_name_ = name
        self.layout_ = layout
        self.embeddings_ = embeddings
        self.coordinates_ = coordinates.astype(np.float32)
        self._kde = GaussianKDE(self.coordinates_)
        self.log_density_ = self._kde.log_density(self.coordinates_)
        self.bandwidth_ = self._kde.bandwidth
        self.covariance_ = self._kde.covariance
        ranked = np.argsort(self.log_density_, kind="stable")
        tenth = -(-len(bank) // 10)
        self._members = {"uniform": np.arange(len(bank)), "majority": ranked[-tenth:], "minority": ranked[:tenth]}
        return self

    @property
    def bank(self) -> ProfileBank:
        """The bank profile ids are looked up in."""
        self._require_fit()
        return self.bank_

    @property
    def digest(self) -> str:
        """SHA-256 of bank and layout: two samplers with the same digest draw the same profiles from the same seed."""
        self._require_fit()
        return hashlib.sha256(bank_digest(self.bank_).encode() + self.coordinates_.tobytes()).hexdigest()

    def sample(self, n: int, population: str, rng: np.random.Generator) -> list[Profile]:
        """Draw `n` profiles, with replacement.

        Raises:
            UnknownNameError: No such population.
        """
        self._require_fit()
        if population in self._members:
            members = self._members[population]
            return [self.bank_[int(i)] for i in members[rng.integers(len(members), size=n)]]
        if population not in self.populations:
            raise UnknownNameError("population", population, self.populations)
        neighbours, _ = nearest(self._kde.draw(n, rng), self._kde.points, 2)
        if population == "virtual":
            return join_neighbours(self.bank_, neighbours)
        return [self.bank_[int(i)] for i in neighbours[:, 0]]

    def members(self, population: str) -> list[Profile]:
        """Everyone who can come from `uniform`, `majority` or `minority`, each equally likely.

        Raises:
            UnknownNameError: Another population.
        """
        self._require_fit()
        if population not in self._members:
            raise UnknownNameError("population with a fixed membership", population, self._members)
        return [self.bank_[int(i)] for i in self._members[population]]

    def draw(self, n: int, population: str, rng: np.random.Generator) -> list[Draw]:
        """See `Sampler.draw`."""
        return [Draw(profile, population) for profile in self.sample(n, population, rng)]

    def observe(self, summaries: Sequence[EpisodeSummary]) -> None:
        """Does nothing: the population does not change with how episodes go."""

    def state_dict(self) -> dict[str, Any]:
        """The digest: nothing changes after `fit`."""
        return {"digest": self.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that `state` comes from a sampler equal to this one.

        Raises:
            SpecError: It does not.
        """
        if state.get("digest") != self.digest:
            raise SpecError(
                f"expected the state of the sampler {self.digest}, got {state.get('digest')!r}: the bank or its layout differs"
            )

    def locate(self, profiles: Sequence[Profile]) -> FloatArray:
        """Coordinates (n, n_components): a bank profile's own, else the distance-weighted mean of the 15 nearest bank profiles'.

        Raises:
            SpecError: New profiles, and the embedder was a callable that is not here (`load(..., embedder=...)`).
        """
        known = self._positions(profiles)
        out = self._kde.points[known]
        if (new := np.flatnonzero(known < 0)).size:
            out[new] = self._place(self._embed([str(profiles[i]) for i in new]))
        return out

    def score(self, profiles: Sequence[Profile]) -> FloatArray:
        """Log density (n,) where `locate` puts the profiles."""
        known = self._positions(profiles)
        out = self.log_density_[known]
        if (new := np.flatnonzero(known < 0)).size:
            out[new] = self._kde.log_density(self.locate([profiles[i] for i in new]))
        return out

    def _positions(self, profiles: Sequence[Profile]) -> npt.NDArray[np.intp]:
        """Each profile's place in the bank, -1 for those that are new or have another text there."""
        self._require_fit()
        index = {profile.id: i for i, profile in enumerate(self.bank_)}
        places = ((index.get(profile.id, -1), profile) for profile in profiles)
        return np.array([i if i >= 0 and str(self.bank_[i]) == str(profile) else -1 for i, profile in places], np.intp)

    def log_density(self, x: FloatArray) -> FloatArray:
        """Log density (m,) at coordinates `x` (m, n_components)."""
        self._require_fit()
        return self._kde.log_density(x)

    def _place(self, embeddings: FloatArray) -> FloatArray:
        bank = self.embeddings_.astype(np.float32)
        indices, distances = nearest(embeddings, bank, min(PLACING_NEIGHBOURS, len(bank)))
        weights = 1 / np.maximum(distances, 1e-9)
        weights /= weights.sum(axis=1, keepdims=True)
        return np.asarray((self._kde.points[indices] * weights[..., None]).sum(axis=1))

    def _embed(self, texts: list[str]) -> FloatArray:
        # The fitted name, not "auto": which embedder that means can differ between the machine that fitted and this one.
        embed = self.embedder if callable(self.embedder) else _resolve(self.embedder_name_)
        embeddings = _checked(embed(texts), len(texts))
        if embeddings.shape[1] != self.embeddings_.shape[1]:
            raise SpecError(
                f"expected embeddings of {self.embeddings_.shape[1]} dimensions, got {embeddings.shape[1]} from {_name(embed)}"
            )
        return embeddings

    def _require_fit(self) -> None:
        if not hasattr(self, "bank_"):
            raise SpecError(
                "this DensitySampler is not fitted: call fit(bank), DensitySampler.load(path, bank) or load_sampler(name)"
            )

    def save(self, path: str | Path) -> None:
        """Write the fitted sampler as `.npz` (arrays, and a JSON text `meta`), atomically. The bank's texts are not in it."""
        meta = {
            "bank": bank_digest(self.bank),
            "bank_name": self.bank.name,
            "embedder": self.embedder_name_,
            "layout": self.layout_,
            "n_components": self.n_components,
            "random_state": self.random_state,
        }
        store.write(Path(path), meta, self.embeddings_, self.coordinates_)

    @classmethod
    def load(cls, path: str | Path, bank: ProfileBank, embedder: EmbedderLike | None = None) -> DensitySampler:
        """Read what `save` wrote.

        Args:
            path: The file.
            bank: The bank that the sampler was fitted on.
            embedder: For `score` of new profiles, where the sampler was fitted with a callable.

        Raises:
            MissingAssetError: No such file.
            SpecError: Not a saved sampler, or one of another bank.
        """
        meta, embeddings, coordinates = store.read(Path(path))
        if meta["bank"] != bank_digest(bank) or len(coordinates) != len(bank):
            raise SpecError(
                f"{path}: this sampler is of another bank ({meta['bank_name']!r}, {len(coordinates)} profiles) than {bank!r}: "
                "ids and texts must be the same, in the same order; fit it again"
            )
        sampler = cls(embedder or meta["embedder"], meta["n_components"], meta["random_state"])
        return sampler._set(bank, meta["embedder"], meta["layout"], embeddings, coordinates)


def bank_digest(bank: ProfileBank) -> str:
    """SHA-256 over ids and texts of a bank, in order."""
    return hashlib.sha256(json.dumps([[p.id, p.objective, p.subjective] for p in bank]).encode()).hexdigest()


def _resolve(embedder: EmbedderLike) -> Callable[[list[str]], Any]:
    if callable(embedder):
        return embedder
    if embedder.startswith(CALLABLE):
        raise SpecError(
            f"this sampler was fitted with {embedder!r}, which no file holds: pass it as DensitySampler.load(..., embedder=...)"
        )
    from usp_env.models import embedders

    return embedders.load(embedder)


def _name(embed: Callable[[list[str]], Any]) -> str:
    return str(getattr(embed, "name", None) or CALLABLE + getattr(embed, "__qualname__", type(embed).__name__))


def _checked(embeddings: Any, n: int) -> FloatArray:
    array = np.asarray(embeddings, np.float32)
    if array.ndim != 2 or len(array) != n or not np.isfinite(array).all():
        raise SpecError(f"expected the embedder to return ({n}, d) finite numbers, got shape {array.shape}")
    return array


def _compact(embeddings: FloatArray) -> FloatArray:
    """Half precision for unit vectors: a fitted sampler and its saved form are then the same, at half the size."""
    return embeddings.astype(np.float16) if np.abs(embeddings).max() <= 1.001 else embeddings
