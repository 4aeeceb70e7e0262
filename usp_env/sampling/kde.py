"""Gaussian kernel density estimate in numpy, so that drawing a profile needs nothing else.

Equal to `scipy.stats.gaussian_kde(points.T)` with Scott's bandwidth (Scott 1992, eq. 6.41).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError

FloatArray = npt.NDArray[np.floating[Any]]

_CHUNK = 1024  # rows per block: 1,024 x 100,000 distances are 0.8 GB


class GaussianKDE:
    """A Gaussian on each point, all with the points' covariance times the bandwidth squared.

    Args:
        points: (n, d), n > d.

    Attributes:
        points: (n, d) float64.
        bandwidth: Scott's factor n^(-1/(d+4)).
        covariance: (d, d), of one kernel.

    Raises:
        SpecError: The points lie in fewer than d dimensions.

    Example:
        >>> kde = GaussianKDE(np.array([[0.0], [2.0]]))
        >>> round(kde.bandwidth, 4), kde.covariance.round(4).tolist()  # 2^(-1/5); variance 2 times its square
        (0.8706, [[1.5157]])
    """

    def __init__(self, points: FloatArray) -> None:
        self.points = np.asarray(points, np.float64)
        n, d = self.points.shape
        spread = np.atleast_2d(np.cov(self.points, rowvar=False)) if n > 1 else np.zeros((d, d))
        eigenvalues = np.linalg.eigvalsh(spread)
        if not eigenvalues[0] > 1e-12 * eigenvalues[-1]:
            raise SpecError(
                f"expected points that spread in {d} dimensions, got {n} points in fewer: too many profiles are alike"
            )
        self.bandwidth = float(n ** (-1 / (d + 4)))
        self.covariance = spread * self.bandwidth**2
        self._factor = np.linalg.cholesky(self.covariance)
        self._whitened = np.linalg.solve(self._factor, self.points.T).T

    def draw(self, n: int, rng: np.random.Generator) -> FloatArray:
        """Draw `n` points: (n, d)."""
        centres = self.points[rng.integers(len(self.points), size=n)]
        return np.asarray(centres + rng.standard_normal(centres.shape) @ self._factor.T)

    def log_density(self, x: FloatArray) -> FloatArray:
        """Natural logarithm of the density at each row of `x` (m, d): (m,)."""
        white = np.linalg.solve(self._factor, np.asarray(x, np.float64).T).T
        blocks = [self._log_sum(white[start : start + _CHUNK]) for start in range(0, len(white), _CHUNK)]
        n, d = self.points.shape
        log_norm = np.log(n) + d / 2 * np.log(2 * np.pi) + np.log(np.diag(self._factor)).sum()
        return np.asarray(np.concatenate(blocks or [np.empty(0)]) - log_norm)

    def _log_sum(self, white: FloatArray) -> FloatArray:
        exponents = -0.5 * squared_distances(white, self._whitened)
        highest = exponents.max(axis=1, keepdims=True)
        return np.asarray(highest[:, 0] + np.log(np.exp(exponents - highest).sum(axis=1)))


def squared_distances(x: FloatArray, y: FloatArray) -> FloatArray:
    """Squared Euclidean distances between the rows of `x` (m, d) and `y` (n, d): (m, n), never below 0."""
    if x.shape[1] <= 3:  # exact, and for one query faster than the product
        return np.asarray(sum((x[:, None, i] - y[None, :, i]) ** 2 for i in range(x.shape[1])))
    products = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
    return np.asarray(np.maximum(products, 0))


def nearest(x: FloatArray, points: FloatArray, k: int) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """The `k` rows of `points` (n, d) nearest to each row of `x` (m, d), nearest first.

    Returns:
        Their indices (m, k) and distances (m, k).

    Example:
        >>> nearest(np.array([[1.0, 0.0]]), np.array([[9.0, 0.0], [0.0, 0.0], [3.0, 0.0]]), 2)[0].tolist()
        [[1, 2]]
    """
    indices, distances = np.empty((len(x), k), np.intp), np.empty((len(x), k))
    for start in range(0, len(x), _CHUNK):
        rows = slice(start, start + _CHUNK)
        squared = squared_distances(x[rows], points)
        near = np.argpartition(squared, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(near, np.argsort(np.take_along_axis(squared, near, axis=1), axis=1, kind="stable"), axis=1)
        indices[rows], distances[rows] = near, np.sqrt(np.take_along_axis(squared, near, axis=1))
    return indices, distances
