"""The density sampler on a bank of two groups, nine to one (issue 2, A5)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from usp_env.errors import MissingAssetError, SpecError, UnknownNameError
from usp_env.profiles import Profile, ProfileBank
from usp_env.sampling import DensitySampler, Sampler, load_fitted, load_sampler
from usp_env.sampling.density import bank_digest
from usp_env.sampling.layout import pca_layout, umap_layout

N = 2000
REAL = ("density", "uniform", "majority", "minority")


def rng(seed=0):
    return np.random.default_rng(seed)


def share_of_cooks(profiles):
    return np.mean([profile.objective.startswith("You cook") for profile in profiles])


def ids(profiles):
    return [profile.id for profile in profiles]


def test_density_keeps_the_proportions(fitted):
    # 90 % cooks; 2.58 standard errors of a binomial with N = 2000: +- .0173
    share = share_of_cooks(fitted.sample(N, "density", rng()))
    assert abs(share - 0.9) < 2.58 * np.sqrt(0.9 * 0.1 / N)
    assert abs(share_of_cooks(fitted.sample(N, "uniform", rng())) - 0.9) < 2.58 * np.sqrt(0.9 * 0.1 / N)


def test_majority_is_the_big_group_and_deciles_bound_the_strata(fitted):
    assert share_of_cooks(fitted.sample(N, "majority", rng())) > 0.95
    low, high = np.quantile(fitted.log_density_, [0.1, 0.9])
    assert (fitted.score(fitted.sample(N, "majority", rng())) >= high).all()
    assert (fitted.score(fitted.sample(N, "minority", rng())) <= low).all()
    assert len(fitted.members("majority")) == len(fitted.members("minority")) == 40
    counts = np.unique(ids(fitted.sample(8000, "majority", rng())), return_counts=True)[1]
    assert len(counts) == 40  # each of the decile, about 200 times
    assert counts.min() > 140
    assert counts.max() < 260


def test_virtual_profiles_join_two_different_neighbours(fitted):
    drawn = fitted.sample(300, "virtual", rng())
    for profile in drawn:
        first, second = profile.id.removeprefix("virtual:").split("+")
        assert first != second
        assert (profile.objective, profile.subjective) == (fitted.bank.get(first).objective, fitted.bank.get(second).subjective)
        assert fitted.bank.get(profile.id) == profile
    # The point of both is the same: OF comes from the very profiles that `density` would give.
    nearest = [profile.id.removeprefix("virtual:").split("+")[0] for profile in drawn]
    assert nearest == ids(fitted.sample(300, "density", rng()))


def test_same_seed_same_profile(fitted):
    for population in fitted.populations:
        first, again = fitted.sample(20, population, rng(3)), fitted.sample(20, population, rng(3))
        assert first == again
        assert first != fitted.sample(20, population, rng(4))
        assert [d.profile for d in fitted.draw(20, population, rng(3))] == first
        assert {d.population for d in fitted.draw(20, population, rng(3))} == {population}


def test_global_random_states_are_untouched(fitted, embed, make_bank):
    before = np.random.get_state()[1].tolist()
    DensitySampler(embedder=embed).fit(make_bank(31)).sample(5, "virtual", rng())
    assert np.random.get_state()[1].tolist() == before


def test_follows_the_protocol_and_the_estimator_convention(fitted, embed, trades):
    assert isinstance(fitted, Sampler)
    assert fitted.bank is fitted.bank_ is trades
    assert (fitted.embedder, fitted.n_components, fitted.random_state) == (embed, 2, 0)
    assert fitted.layout_ == "umap"
    assert fitted.coordinates_.shape == (400, 2)
    assert fitted.embeddings_.shape == (400, 16)
    assert fitted.bandwidth_ == pytest.approx(400 ** (-1 / 6))
    assert fitted.observe([]) is None


def test_unknown_population_suggests_the_right_one(fitted):
    with pytest.raises(UnknownNameError, match="did you mean 'minority'"):
        fitted.sample(1, "minorty", rng())
    with pytest.raises(UnknownNameError, match="fixed membership"):
        fitted.members("virtual")


def test_unfitted_sampler_says_so():
    for use in (lambda s: s.sample(1, "density", rng()), lambda s: s.bank, lambda s: s.score([]), lambda s: s.digest):
        with pytest.raises(SpecError, match="not fitted"):
            use(DensitySampler())


def test_bank_of_9_raises(embed, make_bank):
    with pytest.raises(ValueError, match="at least 10 profiles, got 9"):
        DensitySampler(embedder=embed).fit(make_bank(9))


@pytest.mark.parametrize(("n", "n_components", "needed"), [(10, 2, 30), (12, 2, 30), (29, 2, 30), (32, 8, 33)])
def test_small_banks_use_pca_and_say_so(embed, make_bank, n, n_components, needed):
    with pytest.warns(UserWarning, match=rf"{n} profiles are too few for UMAP \(from {needed}\): laid out with PCA"):
        sampler = DensitySampler(embed, n_components).fit(make_bank(n))
    assert sampler.layout_ == "pca"
    for population in sampler.populations:
        assert len(sampler.sample(7, population, rng())) == 7
    assert len(sampler.members("majority")) == -(-n // 10)


def test_bank_of_40_uses_umap_without_a_warning(fitted, embed, make_bank):
    sampler = DensitySampler(embedder=embed).fit(make_bank(40))
    assert sampler.layout_ == "umap"
    assert len({profile.id for profile in sampler.sample(400, "density", rng())}) > 20


def test_many_separate_groups_fit_without_a_warning(fitted):
    generator = rng()
    groups = [generator.normal(size=(30, 16)) * 0.1 + 50 * generator.normal(size=16) for _ in range(12)]
    assert np.isfinite(umap_layout(np.concatenate(groups), 2, 0)).all()


def test_pca_layout_by_hand():
    # Centred: (-2, 0), (2, 0), (0, -1), (0, 1); the axes are x, then y.
    x = np.array([[1.0, 5.0], [5.0, 5.0], [3.0, 4.0], [3.0, 6.0]])
    np.testing.assert_allclose(np.abs(pca_layout(x, 2)), [[2, 0], [2, 0], [0, 1], [0, 1]], atol=1e-12)
    with pytest.raises(SpecError, match="n_components of at most 2"):
        pca_layout(x, 3)


@pytest.mark.parametrize("bad", [lambda t: np.zeros(len(t)), lambda t: np.zeros((3, 4)), lambda t: np.full((len(t), 4), np.nan)])
def test_embedder_that_returns_something_else_is_refused(make_bank, bad):
    with pytest.raises(SpecError, match=r"expected the embedder to return \(12, d\)"):
        DensitySampler(embedder=bad).fit(make_bank(12))


def test_unit_vectors_are_halved_others_are_not(fitted, make_bank, embed):
    assert fitted.embeddings_.dtype == np.float16
    with pytest.warns(UserWarning, match="PCA"):
        large = DensitySampler(embedder=lambda texts: 1e6 * embed(texts)).fit(make_bank(12))
    assert large.embeddings_.dtype == np.float32


# --- new profiles


def test_score_of_bank_profiles_is_their_own(fitted):
    np.testing.assert_array_equal(fitted.score(list(fitted.bank)), fitted.log_density_)
    np.testing.assert_array_equal(fitted.locate(fitted.bank[5:8]), fitted.coordinates_[5:8])
    assert fitted.score([]).shape == (0,)


def test_new_profiles_land_in_their_group(fitted):
    cooks = fitted.coordinates_[[p.objective.startswith("You cook") for p in fitted.bank]]
    sailors = fitted.coordinates_[[p.objective.startswith("You sail") for p in fitted.bank]]
    xy = fitted.locate([Profile("x", "You cook soup.", "You are curt."), Profile("y", "You sail.", "You are curt.")])
    distance = np.linalg.norm(xy[:, None] - np.stack([cooks.mean(axis=0), sailors.mean(axis=0)]), axis=-1)
    assert distance.argmin(axis=1).tolist() == [0, 1]
    known = fitted.bank[0]
    assert not np.array_equal(
        fitted.locate([replace(known, objective="You cook.")]), fitted.locate([known])
    )  # same id, other text


def test_placing_is_the_distance_weighted_mean_of_the_15_nearest(make_bank):
    # The new profile is .5 away from profile 0 (weight 2), 1 from the next 14 (weight 1), 9 from the last 5 (not among 15).
    bank = make_bank(20)
    place = {str(profile): i for i, profile in enumerate(bank)}
    radius = [0.5] + [1.0] * 14 + [9.0] * 5

    def embed(texts):
        at = [place.get(text) for text in texts]
        return np.array([[0, 0] if i is None else [radius[i] * np.cos(i), radius[i] * np.sin(i)] for i in at])

    with pytest.warns(UserWarning, match="PCA"):
        sampler = DensitySampler(embedder=embed).fit(bank)
    c = sampler.coordinates_.astype(np.float64)
    [xy] = sampler.locate([Profile("new", "You knit.", "You hum.")])
    np.testing.assert_allclose(xy, (2 * c[0] + c[1:15].sum(axis=0)) / 16, atol=1e-5)
    np.testing.assert_allclose(sampler.score([Profile("new", "You knit.", "You hum.")]), sampler.log_density(xy[None]))


# --- files


def test_save_and_load_are_the_same_sampler(fitted, trades, embed, tmp_path):
    file = tmp_path / "deep" / "sampler.npz"
    fitted.save(file)
    loaded = DensitySampler.load(file, trades, embedder=embed)
    assert loaded.digest == fitted.digest
    for name in ("embeddings_", "coordinates_", "log_density_", "covariance_"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(fitted, name))
    for population in fitted.populations:
        assert loaded.sample(50, population, rng(1)) == fitted.sample(50, population, rng(1))
    new = [Profile("x", "You cook soup.", "You are curt.")]
    np.testing.assert_array_equal(loaded.score(new), fitted.score(new))
    loaded.load_state_dict(json.loads(json.dumps(fitted.state_dict())))
    loaded.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()
    assert [p.name for p in file.parent.iterdir()] == ["sampler.npz"]  # nothing left beside it


def test_saved_sampler_of_another_bank_is_refused(fitted, trades, tmp_path):
    fitted.save(tmp_path / "s.npz")
    edited = ProfileBank([replace(trades[0], subjective="You write nothing."), *trades[1:]], "edited")
    for other in (edited, ProfileBank(trades[::-1]), ProfileBank(trades[:-1])):
        with pytest.raises(SpecError, match="another bank"):
            DensitySampler.load(tmp_path / "s.npz", other)
    with pytest.raises(SpecError, match="expected the state"):
        fitted.load_state_dict({"digest": "0"})


def test_a_callable_is_not_in_the_file(fitted, trades, tmp_path):
    fitted.save(tmp_path / "s.npz")
    loaded = DensitySampler.load(tmp_path / "s.npz", trades)
    assert loaded.sample(3, "virtual", rng()) == fitted.sample(3, "virtual", rng())
    with pytest.raises(SpecError, match="pass it as DensitySampler.load"):
        loaded.score([Profile("x", "You cook soup.", "You are curt.")])
    wrong = DensitySampler.load(tmp_path / "s.npz", trades, embedder=lambda texts: np.ones((len(texts), 3)))
    with pytest.raises(SpecError, match="expected embeddings of 16 dimensions, got 3"):
        wrong.score([Profile("x", "You cook soup.", "You are curt.")])


def test_foreign_and_broken_files_are_refused(trades, tmp_path):
    with pytest.raises(MissingAssetError, match="found no file"):
        DensitySampler.load(tmp_path / "none.npz", trades)
    broken = {"empty": b"", "text": b"hello", "cut": b"PK\x03\x04 cut off"}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", meta=np.array([{}], dtype=object), embeddings=np.zeros(3), coordinates=np.zeros(3))
    np.savez(
        tmp_path / "old.npz",
        meta=np.array('{"format": 0, "n_components": 2}'),
        embeddings=np.zeros((3, 2)),
        coordinates=np.zeros((3, 2)),
    )
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in (*broken, "foreign.npz", "pickled.npz", "old.npz", "array.npy"):
        with pytest.raises(SpecError, match="expected a sampler saved by"):
            DensitySampler.load(tmp_path / name, trades)


# --- the shipped bank


@pytest.mark.parametrize(("split", "n"), [("train", 1537), ("val", 102), ("test", 152)])
def test_shipped_samplers_fit_their_bank(split, n):
    sampler = load_sampler("sharegpt", split)
    assert len(sampler.bank) == len(sampler.coordinates_) == n
    assert (sampler.embedder_name_, sampler.layout_) == ("minilm", "umap")
    assert {profile.split for p in sampler.populations for profile in sampler.sample(20, p, rng())} == {split}
    assert load_sampler("sharegpt", split) is sampler
    np.testing.assert_allclose(np.linalg.norm(sampler.embeddings_.astype(np.float64), axis=1), 1, atol=1e-3)


def test_shipped_sampler_needs_numpy_only():
    heavy = ("umap", "sklearn", "scipy", "torch", "transformers", "numba", "pandas", "matplotlib")
    code = f"""
import sys
import numpy as np
from usp_env.sampling import load_sampler
sampler = load_sampler()
for population in sampler.populations:
    sampler.draw(1, population, np.random.default_rng(0))
print([name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_one_draw_takes_less_than_a_millisecond():
    sampler, generator = load_sampler(), rng()
    for population in sampler.populations:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            sampler.draw(1, population, generator)
            times.append(time.perf_counter() - start)
        assert np.median(times) < 1e-3


# --- other banks


@pytest.fixture
def own_bank(make_bank, embed, tmp_path, monkeypatch):
    """A bank file, an empty cache, and the test embedder in place of the default; counts its calls."""
    from usp_env.models import embedders

    calls = []

    def load(name="auto"):
        calls.append(name)
        return embed

    monkeypatch.setenv("USP_ENV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(embedders, "load", load)
    make_bank(12).save(tmp_path / "own.jsonl")
    return tmp_path / "own.jsonl", calls


@pytest.mark.filterwarnings("ignore:12 profiles are too few for UMAP")
def test_other_banks_are_fitted_once_and_kept(own_bank, tmp_path):
    path, calls = own_bank
    assert load_fitted(path) is None
    assert not (tmp_path / "home").exists()
    first = load_sampler(path)  # a bank without splits is taken whole
    again = load_sampler(path)
    assert calls == ["auto"]
    assert again.digest == load_fitted(path).digest == first.digest
    assert [f.stem for f in (tmp_path / "home" / "samplers").iterdir()] == [bank_digest(first.bank)]
    path.write_text(path.read_text("utf-8").replace("dish 3.", "dish three."), "utf-8")
    assert load_sampler(path).digest != first.digest
    assert calls == ["auto", "auto"]


def test_unknown_split_is_an_error(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        load_sampler("sharegpt", "trian")
    ProfileBank([Profile(f"p{i}", f"You cook {i}.", "You hum.", split="val") for i in range(12)]).save(tmp_path / "b.jsonl")
    with pytest.raises(UnknownNameError, match="Known: val"):
        load_sampler(tmp_path / "b.jsonl")
