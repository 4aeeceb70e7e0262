from __future__ import annotations

import sys

import numpy as np
import pytest

from usp_env.errors import SpecError
from usp_env.profiles import Profile
from usp_env.sampling import coverage, local_density_loss, plot, uniformity_loss


def test_local_density_loss_by_hand():
    square = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
    # k=1: everyone's nearest is 3 away. k=2: (3 + 4) / 2. k=3: (3 + 4 + 5) / 3.
    assert local_density_loss(square, k=1) == pytest.approx(3)
    assert local_density_loss(square, k=2) == pytest.approx(3.5)
    assert local_density_loss(square, k=3) == pytest.approx(4)
    # Twins: 0 is 0 away from its double, which is another point; 2 is 2 away.
    assert local_density_loss(np.array([[0.0], [0.0], [2.0]]), k=1) == pytest.approx(2 / 3)


def test_local_density_loss_is_lower_where_it_is_denser_and_blocks_agree():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1300, 6))
    assert local_density_loss(x / 2) == pytest.approx(local_density_loss(x) / 2)
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    assert local_density_loss(x) == pytest.approx(np.sort(distances, axis=1)[:, 1:51].mean())


def test_uniformity_loss_by_hand():
    # Three points on a line: squared distances 1, 1, 4; mean of e^-2, e^-2, e^-8.
    x = np.array([[0.0], [1.0], [2.0]])
    assert uniformity_loss(x) == pytest.approx(np.log((2 * np.exp(-2) + np.exp(-8)) / 3))
    assert uniformity_loss(x, t=0.5) == pytest.approx(np.log((2 * np.exp(-0.5) + np.exp(-2)) / 3))
    assert uniformity_loss(np.ones((5, 2))) == pytest.approx(0)
    assert uniformity_loss(np.array([[0.0], [100.0]])) == pytest.approx(-20000)  # no underflow


def test_uniformity_loss_of_blocks():
    # More points than one block: a lattice 2 apart, then a clump, so that the largest term comes in the second block.
    lattice = 2.0 * np.indices((4, 16, 16)).reshape(3, -1).T
    x = np.concatenate([lattice, 100 + 0.1 * np.random.default_rng(0).normal(size=(76, 3))])
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    pairs = squared[~np.eye(len(x), dtype=bool)]
    assert uniformity_loss(x) == pytest.approx(np.log(np.exp(-2 * pairs).mean()))


@pytest.mark.parametrize(("n", "k"), [(50, 50), (3, 0), (1, 1)])
def test_too_few_points_are_refused(n, k):
    with pytest.raises(SpecError, match="expected more than k"):
        local_density_loss(np.zeros((n, 2)), k)
    with pytest.raises(SpecError, match="at least 2"):
        uniformity_loss(np.zeros((1, 2)))


def test_coverage_by_hand(fitted):
    order = np.argsort(fitted.log_density_, kind="stable")  # 400 profiles: strata of 40
    thin, dense = [fitted.bank[int(i)] for i in order[:40]], [fitted.bank[int(i)] for i in order[-40:]]
    sample = thin[:10] + thin[:10] + dense[:20]
    reached = coverage(fitted, sample)
    assert reached.strata == pytest.approx(2 / 10)
    assert reached.profiles == pytest.approx(30 / 400)
    assert reached.profiles_by_stratum == pytest.approx((10 / 40, *[0.0] * 8, 20 / 40))
    assert reached.sample_by_stratum == pytest.approx((0.5, *[0.0] * 8, 0.5))
    everyone = coverage(fitted, list(fitted.bank), n_strata=7)
    assert (everyone.strata, everyone.profiles) == (1, 1)
    assert everyone.profiles_by_stratum == (1.0,) * 7


def test_coverage_of_virtual_profiles(fitted):
    reached = coverage(fitted, fitted.sample(50, "virtual", np.random.default_rng(0)))
    assert reached.profiles == 0
    assert sum(reached.sample_by_stratum) == pytest.approx(1)


def test_coverage_refuses_nothing(fitted):
    with pytest.raises(SpecError, match="got 0 profiles"):
        coverage(fitted, [])
    with pytest.raises(SpecError, match="and 0 strata"):
        coverage(fitted, [fitted.bank[0]], n_strata=0)


def test_plot_marks_every_population_and_leaves_matplotlib_alone(fitted, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    settings, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    rng = np.random.default_rng(0)
    samples = {p: fitted.sample(8, p, rng) for p in fitted.populations} | {"mine": [Profile("x", "You cook.", "You hum.")]}
    figure = plot(fitted, samples, tmp_path / "density.png")
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    marks = {c.get_label(): c.get_offsets() for c in figure.axes[0].collections if not c.get_label().startswith("_")}
    assert set(marks) == {"bank", *samples}
    np.testing.assert_allclose(marks["virtual"], fitted.locate(samples["virtual"]))
    assert figure.axes[0].get_xlabel() == "UMAP 1"
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) is pyplot


def test_plot_needs_two_components(make_bank, embed):
    from usp_env.sampling import DensitySampler

    with pytest.warns(UserWarning, match="PCA"):
        sampler = DensitySampler(embed, n_components=3).fit(make_bank(20))
    with pytest.raises(SpecError, match="n_components=2, got 3"):
        plot(sampler)


def test_plot_by_default_needs_no_embedder(fitted):
    pytest.importorskip("matplotlib")
    figure = plot(fitted)
    labels = {c.get_label() for c in figure.axes[0].collections if not c.get_label().startswith("_")}
    assert labels == {"bank", "density", "uniform", "majority", "minority"}
