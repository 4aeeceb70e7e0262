"""Embeddings to few dimensions, where density can be estimated."""

from __future__ import annotations

import warnings

import numpy as np

from usp_env.errors import SpecError, require
from usp_env.sampling.kde import FloatArray

UMAP_NEIGHBOURS = 15


def pca_layout(embeddings: FloatArray, n_components: int) -> FloatArray:
    """Coordinates (n, n_components) on the principal axes of `embeddings` (n, d).

    Raises:
        SpecError: `n_components` is larger than n or d.
    """
    if n_components > min(embeddings.shape):
        raise SpecError(
            f"expected n_components of at most {min(embeddings.shape)} for embeddings {embeddings.shape}, got {n_components}"
        )
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    u, singular, _ = np.linalg.svd(centred, full_matrices=False)
    return np.asarray(u[:, :n_components] * singular[:n_components])


def umap_layout(embeddings: FloatArray, n_components: int, random_state: int) -> FloatArray:
    """Coordinates (n, n_components) by UMAP (McInnes et al. 2018), 15 neighbours, Euclidean distance.

    The same numbers on the same machine; between machines they differ in the last digits and then grow apart, which is
    why fitted samplers are saved.

    Raises:
        MissingExtraError: umap-learn is not installed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        # Both concern only where UMAP's optimiser starts, and are expected of a bank of well separated groups.
        warnings.filterwarnings("ignore", "Graph is not fully connected", UserWarning)
        warnings.filterwarnings("ignore", "Spectral initialisation failed", UserWarning)
        umap = require("umap", "sampling")
        # n_jobs=1 is what random_state implies; said outright, UMAP does not warn of it.
        model = umap.UMAP(n_components=n_components, n_neighbors=UMAP_NEIGHBOURS, random_state=random_state, n_jobs=1)
        return np.asarray(model.fit_transform(embeddings.astype(np.float32)))
