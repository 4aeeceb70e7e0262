import numpy as np
import pytest

from usp_env.errors import SpecError
from usp_env.sampling.kde import GaussianKDE, nearest, squared_distances


def test_hand_computed_density():
    # Two points 0 and 2: variance 2, bandwidth 2^(-1/5), kernel variance 2 * 2^(-2/5) = 1.515717.
    # At 1 both kernels give exp(-1/(2 * 1.515717)) / sqrt(2 pi 1.515717) = 0.719012 / 3.086022 = 0.232990.
    kde = GaussianKDE(np.array([[0.0], [2.0]]))
    assert kde.covariance[0, 0] == pytest.approx(1.515717, abs=1e-6)
    assert np.exp(kde.log_density(np.array([[1.0]])))[0] == pytest.approx(0.232990, abs=1e-6)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_equals_scipy(d):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    points, x = rng.normal(size=(60, d)) @ rng.normal(size=(d, d)), rng.normal(size=(1500, d)) * 2
    ours, theirs = GaussianKDE(points), stats.gaussian_kde(points.T)
    np.testing.assert_allclose(ours.covariance, theirs.covariance, rtol=1e-10)
    np.testing.assert_allclose(ours.log_density(x), theirs.logpdf(x.T), rtol=1e-9)


def test_far_points_do_not_underflow():
    kde = GaussianKDE(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert np.isfinite(kde.log_density(np.array([[1e6, 0.0]]))).all()


def test_draws_have_the_moments_of_the_density():
    points = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0], [4.0, 2.0]])
    kde = GaussianKDE(points)
    drawn = kde.draw(40_000, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.mean(axis=0), [2, 1], atol=0.05)
    # A mixture's covariance is that of its centres (4 and 1, with 1/n) plus the kernel's.
    np.testing.assert_allclose(np.cov(drawn.T), np.diag([4.0, 1.0]) + kde.covariance, atol=0.15)


@pytest.mark.parametrize("points", [np.zeros((20, 2)), np.arange(20.0)[:, None] * [1.0, 2.0], np.ones((1, 2))])
def test_points_that_do_not_spread_are_refused(points):
    with pytest.raises(SpecError, match="spread in 2 dimensions"):
        GaussianKDE(points)


@pytest.mark.parametrize("d", [2, 8])
def test_nearest_is_sorted_and_right(d):
    rng = np.random.default_rng(1)
    points, x = rng.normal(size=(50, d)), rng.normal(size=(1100, d))  # more rows than one block
    brute = np.linalg.norm(x[:, None] - points[None], axis=-1)
    indices, distances = nearest(x, points, 4)
    np.testing.assert_array_equal(indices, np.argsort(brute, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(brute, axis=1)[:, :4], atol=1e-7)
    assert (squared_distances(points, points) >= 0).all()
