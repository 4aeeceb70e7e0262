from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usp_env.errors import SpecError
from usp_env.metrics import diversity
from usp_env.metrics.diversity import first_turn_diversity, ldl, spread, uniformity, wasserstein

NUMBERS = st.lists(st.integers(-20, 20), min_size=1, max_size=8)


def test_ldl_caps_k_and_says_so():
    square = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
    assert ldl(square, k=1) == (pytest.approx(3), 1)
    assert ldl(square) == (pytest.approx(4), 3)  # (3 + 4 + 5) / 3
    assert ldl(np.zeros((60, 2))) == (0, 50)
    for few in (np.zeros((1, 2)), np.zeros((0, 2))):
        value, k = ldl(few)
        assert np.isnan(value)
        assert k == 0
    with pytest.raises(SpecError, match="k >= 1"):
        ldl(square, k=0)


def test_uniformity_by_hand():
    # Three unit vectors: squared distances 2, 2, 4.
    x = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert uniformity(x) == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3))
    assert uniformity(x, t=1) == pytest.approx(np.log((2 * np.exp(-2) + np.exp(-4)) / 3))
    assert uniformity(np.ones((4, 2))) == pytest.approx(0)
    assert np.isnan(uniformity(x[:1]))


def test_first_turn_diversity_by_hand():
    # "a b" with "b c": 1 shared of 3, distance 2/3; either with "d": 1.
    values = first_turn_diversity(["a b", "B, c!", "d"])
    assert values == pytest.approx([5 / 6, 5 / 6, 1])
    assert first_turn_diversity(["a b", "a b c d"]) == pytest.approx([0.5, 0.5])
    assert first_turn_diversity(["same words", "Same WORDS?"]).tolist() == [0, 0]


def test_first_turn_diversity_of_silence_is_no_number():
    values = first_turn_diversity(["a", "", "b", "?!"])
    np.testing.assert_array_equal(values, [1, np.nan, 1, np.nan])  # the silent do not count as others either
    assert np.isnan(first_turn_diversity(["a", ""])).all()
    assert np.isnan(first_turn_diversity(["a"])).all()
    assert first_turn_diversity([]).shape == (0,)
    assert first_turn_diversity(["ñandú 東京", "ÑANDÚ"]) == pytest.approx([0.5, 0.5])


def test_first_turn_diversity_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    sets = [{f"w{i}" for i in rng.integers(30, size=rng.integers(1, 12))} for _ in range(15)]
    monkeypatch.setattr(diversity, "_COLUMNS", 7)
    jaccard = [[1 - len(a & b) / len(a | b) for b in sets] for a in sets]
    expected = np.sum(jaccard, axis=1) / 14
    assert first_turn_diversity([" ".join(sorted(words)) for words in sets]) == pytest.approx(expected)


def test_wasserstein_by_hand():
    assert wasserstein([1, 2, 3], [3, 1, 2]) == 0
    assert wasserstein([0, 0], [5]) == 5
    # {1, 2} against {1, 2, 6}: F differs by 1/2 - 1/3 on [1, 2] and by 1 - 2/3 on [2, 6]: 1/6 + 4/3.
    assert wasserstein([1, 2], [1, 2, 6]) == pytest.approx(1.5)
    assert np.isnan(wasserstein([], [1.0]))
    assert np.isnan(wasserstein([1.0], np.zeros(0)))
    with pytest.raises(SpecError, match="finite"):
        wasserstein([1, np.nan], [1])


@given(NUMBERS, NUMBERS, NUMBERS)
def test_wasserstein_is_a_metric(a, b, c):
    assert wasserstein(a, b) == pytest.approx(wasserstein(b, a))
    assert wasserstein(a, c) <= wasserstein(a, b) + wasserstein(b, c) + 1e-9
    assert wasserstein([x + 3 for x in a], a) == pytest.approx(3)
    assert wasserstein(a, a * 2) == pytest.approx(0)  # twice the same sample is the same distribution


@given(NUMBERS, NUMBERS)
def test_wasserstein_is_scipys(a, b):
    stats = pytest.importorskip("scipy.stats")
    assert wasserstein(a, b) == pytest.approx(stats.wasserstein_distance(a, b))


# Collapse


def test_spread_by_hand():
    # People at 0±1, 4±1, 8±1, 12±1: within 8 · 1 over 8 - 4; between 2 (36 + 4 + 4 + 36) = 160 over 3.
    x = np.array([[c + d, 0.0] for c in (0, 4, 8, 12) for d in (-1, 1)])
    found = spread(x, list("aabbccdd"))
    assert found.within == pytest.approx(2)
    assert found.f == pytest.approx(160 / 3 / 2)
    assert found.between == pytest.approx((160 / 3 - 2) / 2)  # 2 dialogues each
    assert found.ratio == pytest.approx(found.between / 2)
    assert found.p_value < 0.05
    assert found.alarm is False


def test_spread_of_unequal_numbers_of_dialogues():
    # Groups of 1, 2, 3, 4: n_0 = (10 - 30 / 10) / 3 = 7 / 3.
    rng = np.random.default_rng(0)
    labels = [k for k in range(4) for _ in range(k + 1)]
    x = rng.normal(size=(10, 3)) + 10 * np.array(labels)[:, None]
    means = np.array([x[np.array(labels) == k].mean(axis=0) for k in labels])
    ms_within = ((x - means) ** 2).sum() / 6
    ms_between = ((means - x.mean(axis=0)) ** 2).sum() / 3
    found = spread(x, labels)
    assert found.within == pytest.approx(ms_within)
    assert found.f == pytest.approx(ms_between / ms_within)
    assert found.between == pytest.approx((ms_between - ms_within) * 3 / 7)
    order = rng.permutation(10)
    shuffled = spread(x[order], [labels[i] for i in order])
    assert shuffled[:4] == pytest.approx(found[:4])


def test_a_constant_user_sets_off_the_alarm():
    people = [k for k in range(6) for _ in range(3)]
    constant = np.full((18, 4), 0.5, np.float32) + 1e-8 * np.random.default_rng(0).normal(size=(18, 4))
    found = spread(constant, people)
    assert found.alarm
    assert np.isnan(found.p_value)


def test_a_user_who_ignores_the_profile_sets_off_the_alarm_and_one_who_heeds_it_does_not():
    rng = np.random.default_rng(3)
    people = [f"p{k}" for k in range(20) for _ in range(3)]
    noise = rng.normal(size=(60, 8))
    own = np.repeat(rng.normal(size=(20, 8)), 3, axis=0)
    assert spread(noise, people, permutations=199).alarm
    heeds = spread(noise + own, people, permutations=199)
    assert not heeds.alarm
    assert heeds.p_value == pytest.approx(1 / 200)
    assert 0.5 < heeds.ratio < 2  # both have variance 1 in every direction


def test_the_alarm_is_silent_by_chance_as_often_as_alpha():
    rng = np.random.default_rng(0)
    people = [k for k in range(8) for _ in range(2)]
    silent = [not spread(rng.normal(size=(16, 3)), people, permutations=99, seed=i).alarm for i in range(300)]
    assert 0.02 < np.mean(silent) < 0.09


@pytest.mark.parametrize("seed", range(4))
def test_people_who_never_vary_are_told_apart(seed):
    x = np.repeat(np.random.default_rng(seed).normal(size=(5, 7)), 2, axis=0)  # sums of squares that differ by rounding
    found = spread(x, [k for k in range(5) for _ in range(2)])
    assert found.f == np.inf
    assert found.ratio == np.inf
    assert not found.alarm


def test_spread_is_seeded():
    x = np.random.default_rng(0).normal(size=(12, 2))
    people = [k for k in range(6) for _ in range(2)]
    assert spread(x, people, seed=1) == spread(x, people, seed=1)
    assert spread(x, people, seed=1).p_value != spread(x, people, seed=2).p_value


@pytest.mark.parametrize(
    ("people", "message"),
    [
        ("aaaa", "2 people"),
        ("abcd", "2 dialogues"),
        ("aabb", "too few"),
        ("aabbc", "a profile for each"),
        ("aabbcc", "a profile"),
    ],
)
def test_spread_refuses_what_it_cannot_judge(people, message):
    with pytest.raises(SpecError, match=message):
        spread(np.eye(4), list(people))


def test_spread_counts_the_ways_to_share_out_dialogues():
    # 3 people with 2 each: 6! / (2!^3 3!) = 15 ways, p is at least 1/15. 4 people: 105 ways.
    with pytest.raises(SpecError, match="6 dialogues of 3 people"):
        spread(np.eye(6), list("aabbcc"))
    assert spread(np.eye(6), list("aabbcc"), alpha=0.1).f == pytest.approx(1)
    assert spread(np.eye(8), list("aabbccdd")).alarm


def test_spread_refuses_too_few_permutations():
    with pytest.raises(SpecError, match="9 permutations"):
        spread(np.eye(8), list("aabbccdd"), permutations=9)
