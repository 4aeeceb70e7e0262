from __future__ import annotations

import numpy as np
import pytest

from usp_env.errors import SpecError
from usp_env.metrics import statistics
from usp_env.metrics.statistics import (
    mean_interval,
    minimum_detectable_effect,
    paired_difference,
    percentile_interval,
    person_means,
    ratio_interval,
)

NAN = float("nan")


def population(rng, people=30, seeds=3, between=1.0, within=1.0):
    """One value per dialogue of a population with mean 0, and whose it is."""
    values = np.repeat(rng.normal(0, between, people), seeds) + rng.normal(0, within, people * seeds)
    return values, np.repeat(np.arange(people), seeds).tolist()


def test_a_person_counts_once():
    values, people = [1.0, 2.0, 3.0, 10.0], ["ann", "ann", "ann", "bob"]
    assert person_means(values, people) == {"ann": 2, "bob": 10}
    assert mean_interval(values, people).value == 6  # not 16 / 4
    assert mean_interval(values, people).n == 2


def test_values_that_are_not_defined_are_left_out():
    values, people = [1.0, NAN, 3.0, NAN, 5.0], ["ann", "ann", "bob", "cy", "bob"]
    assert person_means(values, people) == {"ann": 1, "bob": 4}
    interval = mean_interval(values, people)
    assert interval.value == 2.5
    assert interval.n == 2
    for nothing in ([NAN, NAN], []):
        empty = mean_interval(nothing, ["ann", "bob"][: len(nothing)])
        assert np.isnan(empty[:3]).all()
        assert empty.n == 0


def test_one_person_gives_no_interval():
    interval = mean_interval([1.0, 3.0], ["ann", "ann"])
    assert interval.value == 2
    assert np.isnan([interval.low, interval.high]).all()


def test_mean_interval_by_hand():
    # People 0 and 1 with one dialogue each: replicates are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    interval = mean_interval([0.0, 1.0], ["ann", "bob"])
    assert interval == (0.5, 0, 1, 2)
    # Within: ann always has mean 0 when only people are resampled; her dialogues -1 and 1 come into it otherwise.
    values, people = [-1.0, 1.0, 0.0, 0.0], ["ann", "ann", "bob", "bob"]
    assert mean_interval(values, people, within=False)[:3] == (0, 0, 0)
    # Both draws ann (1/4), and both of her dialogues -1 twice (1/16): the lowest mean -1 has 1/64; 2.5 % lies above it, at -0.5.
    assert mean_interval(values, people, replicates=20_000)[:3] == (0, -0.5, 0.5)


def test_people_may_have_different_numbers_of_dialogues():
    assert mean_interval([1.0] * 5, ["ann", "bob", "bob", "bob", "cy"]) == (1, 1, 1, 3)
    # Ann has 8 dialogues of 1, three others one of 0. Of 4 draws 3 or more are ann in 13 of 256 replicates, 4 in 1 of 256:
    # the 97.5th percentile has her thrice, 24 of 25 dialogues.
    people = ["ann"] * 8 + ["bob", "cy", "di"]
    pooled = ratio_interval([1.0] * 8 + [0.0] * 3, [1.0] * 11, people, within=False)
    assert pooled == (8 / 11, 0, 0.96, 4)


def test_intervals_are_seeded_and_leave_the_global_state_alone():
    values, people = population(np.random.default_rng(0))
    before = np.random.get_state()[1].copy()
    assert mean_interval(values, people, seed=1) == mean_interval(values, people, seed=1)
    assert mean_interval(values, people, seed=1) != mean_interval(values, people, seed=2)
    assert (np.random.get_state()[1] == before).all()


def test_blocks_cover_all_replicates(monkeypatch):
    values, people = population(np.random.default_rng(0), people=10)
    whole = mean_interval(values, people, replicates=3000)
    monkeypatch.setattr(statistics, "_BLOCK", 10 * 3 * 7)  # 7 replicates at a time, and 4 in the last block
    blocks = list(statistics._resampled_rows([statistics._table([values], people)], 3000, 0, True))
    assert sum(len(drawn) for drawn, _ in blocks) == 3000
    assert mean_interval(values, people, replicates=3000)[1:3] == pytest.approx(whole[1:3], abs=0.1)


@pytest.mark.parametrize("within", [True, False])
def test_the_95_percent_interval_covers_95_percent(within):
    rng = np.random.default_rng(1)
    covered, naive = [], []
    for seed in range(300):
        values, people = population(rng)
        interval = mean_interval(values, people, replicates=300, seed=seed, within=within)
        covered.append(interval.low <= 0 <= interval.high)
        alone = mean_interval(values, range(len(values)), replicates=300, seed=seed)  # as if dialogues were people
        naive.append(alone.low <= 0 <= alone.high)
    assert 0.91 < np.mean(covered) < 0.985
    assert np.mean(naive) < 0.9


def test_the_width_is_that_of_theory():
    values, people = population(np.random.default_rng(0), people=400, seeds=2)
    means = np.array(list(person_means(values, people).values()))
    interval = mean_interval(values, people, within=False)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * means.std() / 20, rel=0.05)
    # Dialogues resampled too: their variance 1/2 (of a mean of 2) comes in once more, times (s - 1) / s.
    pairs = values.reshape(400, 2)
    again = ((pairs - pairs.mean(axis=1, keepdims=True)) ** 2).mean(axis=1).mean() / 2
    both = mean_interval(values, people)
    assert both.high - both.low == pytest.approx(2 * 1.96 * np.sqrt(means.var() + again) / 20, rel=0.05)


# Two users on the same people


def test_paired_difference_by_hand():
    a, people_a = [1.0, 3.0, 6.0], ["ann", "ann", "bob"]
    b, people_b = [5.0, 1.0], ["bob", "ann"]  # any order, other numbers of dialogues
    difference = paired_difference(a, people_a, b, people_b, within=False)
    assert difference == (1, 1, 1, 2)
    back = paired_difference(b, people_b, a, people_a)
    assert back.value == -1


def test_pairing_takes_out_what_people_differ_by():
    rng = np.random.default_rng(0)
    person = np.repeat(rng.normal(0, 10, 50), 2)
    people = np.repeat(np.arange(50), 2).tolist()
    a, b = person + rng.normal(0.5, 0.5, 100), person + rng.normal(0, 0.5, 100)
    paired = paired_difference(a, people, b, people)
    assert 0 < paired.low < 0.5 < paired.high
    alone = mean_interval(a, people)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_a_user_against_itself_differs_by_nothing():
    values, people = population(np.random.default_rng(0))
    assert paired_difference(values, people, values, people, within=False)[:3] == (0, 0, 0)


def test_a_person_undefined_on_one_side_is_left_out_of_both():
    difference = paired_difference([1.0, 5.0, NAN], list("abc"), [0.0, NAN, 2.0], list("abc"))
    assert difference.value == 1
    assert difference.n == 1
    nobody = paired_difference([NAN], ["a"], [1.0], ["a"])
    assert np.isnan(nobody[:3]).all()
    assert nobody.n == 0


def test_other_people_are_refused():
    for function in (paired_difference, minimum_detectable_effect):
        with pytest.raises(SpecError, match=r"same people on both sides, 2 are on one only: \['b', 'c'\]"):
            function([1.0, 2.0], ["a", "b"], [1.0, 2.0], ["a", "c"])
    with pytest.raises(SpecError, match=r"a value and a person for each dialogue, got \[1\] and 2"):
        mean_interval([1.0], ["a", "b"])
    with pytest.raises(SpecError, match="1 replicate"):
        mean_interval([1.0], ["a"], replicates=0)


def test_ratio_interval_by_hand():
    # Sums 3 / 10; ann alone 1 / 5, bob alone 2 / 5.
    assert ratio_interval([1, 0, 2], [4, 1, 5], ["ann", "ann", "bob"], within=False) == (0.3, 0.2, 0.4, 2)
    # Within: numerator and denominator of a dialogue stay together, so 0 / 1 and 1 / 4 are ann's lowest and highest.
    ratio = ratio_interval([1, 0], [4, 1], ["ann", "bob"])
    assert ratio == (0.2, 0, 0.25, 2)
    ann = ratio_interval([1, 0, 1, 0], [4, 1, 4, 1], ["ann", "ann", "bob", "bob"], replicates=20_000)
    assert ann[:3] == pytest.approx((0.2, 0, 0.25))
    assert np.isnan(ratio_interval([0, 0], [0, 0], ["ann", "bob"])[:3]).all()
    assert ratio_interval([], [], []).n == 0


def test_ratio_interval_of_an_f1():
    # TP 2, 0; FP 1, 0; FN 0, 1: 2 TP over 2 TP + FP + FN is 4 / 6.
    assert ratio_interval([4, 0], [5, 1], ["ann", "bob"]).value == pytest.approx(4 / 6)


def test_percentile_interval_by_hand():
    blocks = [np.arange(21.0), np.arange(21.0, 41)]
    assert percentile_interval(7, blocks, 5) == pytest.approx((7, 1, 39, 5))  # 2.5 % and 97.5 % of 0..40
    assert percentile_interval(7, [np.array([NAN, 3, 3])], 5) == (7, 3, 3, 5)
    assert np.isnan(percentile_interval(7, [np.array([NAN])], 5)[1:3]).all()


# Minimum detectable effect


def test_minimum_detectable_effect_by_hand():
    # Differences 0, 2, 4: s = 2, n = 3; z.975 + z.8 = 1.95996 + .84162.
    args = ([1.0, 3.0, 5.0], list("abc"), [1.0, 1.0, 1.0], list("abc"))
    assert minimum_detectable_effect(*args) == pytest.approx(2.80158 * 2 / np.sqrt(3), rel=1e-5)
    assert minimum_detectable_effect(*args, power=0.5) == pytest.approx(1.95996 * 2 / np.sqrt(3), rel=1e-5)
    assert np.isnan(minimum_detectable_effect([1.0], ["a"], [0.0], ["a"]))
    # Where nothing varies, nothing tells what could be detected: not 0, and not what rounding leaves of it.
    assert np.isnan(minimum_detectable_effect([1.0, 2.0], list("ab"), [0.0, 1.0], list("ab")))
    assert np.isnan(minimum_detectable_effect([0.3, 0.2, 0.7], list("abc"), [0.1, 0.0, 0.5], list("abc")))


def test_the_effect_is_found_with_the_power_it_says():
    rng = np.random.default_rng(0)
    people = list(range(60))
    effect = 2.80158 / np.sqrt(60)  # differences of standard deviation 1
    assert minimum_detectable_effect(rng.normal(size=60), people, [0.0] * 60, people) == pytest.approx(effect, rel=0.25)
    found = [
        paired_difference(rng.normal(effect, 1, 60), people, [0.0] * 60, people, replicates=200, seed=seed).low > 0
        for seed in range(200)
    ]
    assert 0.7 < np.mean(found) < 0.9
