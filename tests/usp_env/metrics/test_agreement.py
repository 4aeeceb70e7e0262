from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usp_env.errors import SpecError
from usp_env.metrics import agreement
from usp_env.metrics.agreement import cohen_kappa, elo, fleiss_kappa, ranking_interval, ranks, spearman, spearman_interval

NAN = float("nan")
PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9)


# Spearman


def test_ranks_share_ties():
    assert ranks([5, 1, 5, 5, 9]).tolist() == [3, 1, 3, 3, 5]
    assert ranks([]).tolist() == []


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # Ties: ranks 1.5, 1.5, 3 against 1, 2, 3: deviations (-.5, -.5, 1) · (-1, 0, 1) = 1.5, over sqrt(1.5 · 2).
    assert spearman([0, 0, 7], [1, 2, 3]) == pytest.approx(1.5 / np.sqrt(3))
    assert spearman([1, 2, 3], [30, 20, 10]) == -1
    assert spearman([1, 2, 3], np.exp([1, 2, 3])) == 1  # the order alone counts


def test_spearman_without_an_order_is_no_number():
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1], [1]), ([], []), ([1, NAN], [1, 2])):
        assert np.isnan(spearman(x, y))
    assert spearman([1, NAN, 2, 3], [1, 0, NAN, 2]) == 1
    with pytest.raises(SpecError, match="one length"):
        spearman([1, 2], [1])


@given(PAIRS)
def test_spearman_is_scipys(pairs):
    stats = pytest.importorskip("scipy.stats")
    x, y = zip(*pairs, strict=True)
    value = spearman(x, y)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert value == pytest.approx(stats.spearmanr(x, y).statistic)
    else:
        assert np.isnan(value)


def test_spearman_interval_covers_the_value_and_narrows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = x + rng.normal(size=200)
    wide, narrow = spearman_interval(x[:20], y[:20], replicates=300), spearman_interval(x, y, replicates=300)
    assert wide.low < wide.value < wide.high
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)
    assert narrow.value == pytest.approx(spearman(x, y))
    assert narrow == spearman_interval(x, y, replicates=300)
    assert spearman_interval(x, y, replicates=300, seed=1) != narrow
    empty = spearman_interval([], [])
    assert np.isnan(empty[:3]).all()
    assert empty.n == 0


def test_ranking_interval_by_hand():
    # Two people rank three players alike, against the reference in reverse.
    scores = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    assert ranking_interval(scores, [3, 2, 1], replicates=50) == (-1, -1, -1, 2)
    # Means 0, 0, 3 with people who disagree on the first two: each alone gives 1 and 1/2.
    split = np.array([[-1.0, 1.0, 3.0], [1.0, -1.0, 3.0]])
    interval = ranking_interval(split, [1, 2, 3])
    assert interval.value == pytest.approx(1.5 / np.sqrt(3))
    assert (interval.low, interval.high) == pytest.approx((0.5, 1))
    with pytest.raises(SpecError, match=r"finite scores \(people, players\)"):
        ranking_interval(scores, [1, 2])
    with pytest.raises(SpecError, match="finite"):
        ranking_interval(np.array([[NAN, 1.0]]), [1, 2])


# Kappa


def test_cohen_kappa_by_hand():
    pytest.importorskip("sklearn")
    # Agreement 35 of 50 (20 yes, 15 no); margins yes 25 and 30: p_e = .5 · .6 + .5 · .4; (.7 - .5) / .5.
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa(a, a) == pytest.approx(1)
    assert cohen_kappa(["x", "x"], ["y", "y"]) == pytest.approx(0)


def test_cohen_kappa_weighs_ordered_labels():
    pytest.importorskip("sklearn")
    a, near, far = [1, 2, 3, 1, 2, 3], [1, 2, 3, 2, 2, 3], [1, 2, 3, 3, 2, 3]
    assert cohen_kappa(a, near, "quadratic") > cohen_kappa(a, far, "quadratic")
    # low, mid, high are 0, 1, 2: 1 - (1 + 1 + 0)/3 over (9 + 2 + 1)/9; sorted, high comes first: 1 - (1 + 4 + 0)/3 over (3 + 8 + 4)/9
    a, b = ["low", "mid", "high"], ["mid", "high", "high"]
    assert cohen_kappa(a, b, "quadratic", ["low", "mid", "high"]) == pytest.approx(0.5)
    assert cohen_kappa(a, b, "quadratic") == pytest.approx(0)


def test_cohen_kappa_without_choice_is_no_number():
    assert np.isnan(cohen_kappa(["a", "a"], ["a", "a"]))
    assert np.isnan(cohen_kappa([], []))
    with pytest.raises(SpecError, match="one label of each rater"):
        cohen_kappa(["a"], [])


def test_fleiss_kappa_of_the_textbook_table():
    # 10 items, 14 raters, 5 labels: the worked example after Fleiss (1971); P = .378, P_e = .213.
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    ratings = [[label for label, n in enumerate(row) for _ in range(n)] for row in table]
    assert fleiss_kappa(ratings) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_kappa_by_hand():
    assert fleiss_kappa(["aa", "bb"]) == pytest.approx(1)
    # Two raters who always differ: P = 0, P_e = 1/2.
    assert fleiss_kappa(["ab", "ba"]) == pytest.approx(-1)
    assert np.isnan(fleiss_kappa(["aa", "aa"]))
    assert np.isnan(fleiss_kappa([]))
    for bad in (["aab", "ab"], ["a", "b"]):
        with pytest.raises(SpecError, match="same number of ratings"):
            fleiss_kappa(bad)


# Elo


def matches(strength: dict[str, float], n: int, seed: int = 0) -> list[tuple[str, str, float]]:
    rng = np.random.default_rng(seed)
    names = list(strength)
    drawn = [rng.choice(len(names), 2, replace=False) for _ in range(n)]
    odds = [(names[i], names[j], 1 / (1 + 10 ** ((strength[names[j]] - strength[names[i]]) / 400))) for i, j in drawn]
    return [(a, b, float(rng.random() < p)) for a, b, p in odds]


def test_elo_by_hand():
    # Odds 3 : 1 are 400 log10 3 = 190.85 apart; a draw is half a win.
    won = [("ann", "bob", 1.0)] * 2 + [("bob", "ann", 0.5)] * 2
    assert elo(won, prior=0) == pytest.approx({"ann": 1000 + 95.424, "bob": 1000 - 95.424}, abs=1e-3)
    assert elo([("ann", "bob", 0.5)]) == {"ann": 1000, "bob": 1000}
    assert elo([]) == {}


def test_elo_is_the_maximum_of_the_likelihood():
    strength = {"a": 1200.0, "b": 1100.0, "c": 1000.0, "d": 700.0}
    played = matches(strength, 300)
    rated = elo(played, prior=0)
    for name in rated:  # at the maximum, expected and real scores agree
        expected = sum(
            1 / (1 + 10 ** ((rated[b if a == name else a] - rated[name]) / 400)) for a, b, _ in played if name in (a, b)
        )
        scored = sum(score if a == name else 1 - score for a, b, score in played if name in (a, b))
        assert expected == pytest.approx(scored, abs=1e-5)
    assert list(rated) == ["a", "b", "c", "d"]
    assert rated == pytest.approx(strength, abs=80)


@pytest.mark.parametrize("prior", [0, 0.5])
def test_elo_does_not_depend_on_the_order_or_the_side(prior):
    played = matches({"a": 1100.0, "b": 1000.0, "c": 900.0}, 80)
    shuffled = [(b, a, 1 - score) if i % 2 else (a, b, score) for i, (a, b, score) in enumerate(played)]
    random.Random(0).shuffle(shuffled)
    assert elo(shuffled, prior=prior) == pytest.approx(elo(played, prior=prior), abs=1e-6)


def test_elo_of_one_who_never_lost():
    played = [("ann", "bob", 1.0)] * 5
    few, many = elo(played), elo(played * 10)
    assert few["ann"] < many["ann"] < 2000  # finite, and further up the more matches speak for it
    assert sum(few.values()) == pytest.approx(2000)
    with pytest.raises(SpecError, match="prior above 0"):
        elo(played, prior=0)
    circle = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 1.0)]
    assert elo(circle, prior=0) == pytest.approx(dict.fromkeys("abc", 1000.0))
    with pytest.raises(SpecError, match="prior above 0"):
        elo([*circle, ("a", "d", 1.0)], prior=0)


def test_the_mean_rating_is_1000_whoever_won():
    lopsided = elo([("a", "b", 1.0)] * 9 + [("a", "c", 1.0)])
    assert np.mean(list(lopsided.values())) == pytest.approx(1000)


@pytest.mark.parametrize("bad", [("a", "a", 1.0), ("a", "b", 2.0), ("a", "b", NAN)])
def test_elo_refuses_results_that_are_none(bad):
    with pytest.raises(SpecError, match="two players and a score"):
        elo([bad])


def test_elo_that_does_not_converge_is_refused(monkeypatch):
    monkeypatch.setattr(agreement, "_MAX_STEPS", 2)
    with pytest.raises(SpecError, match="still move"):
        elo(matches({"a": 1200.0, "b": 1000.0, "c": 800.0}, 50))
