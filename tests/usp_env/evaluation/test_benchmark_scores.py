"""The leaderboard's numbers by hand: published rows, averages, gaps, Elo's order, intervals."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import numpy as np
import pytest

from usp_env.errors import SpecError
from usp_env.evaluation.benchmark_bootstrap import EpisodeScore, Resampled, Table, resample
from usp_env.evaluation.benchmark_scores import against, results
from usp_env.evaluation.leaderboard import Estimate
from usp_env.metrics.agreement import elo, elo_ratings, spearman, spearman_interval
from usp_env.metrics.statistics import Interval, mean_interval, paired_difference

# Wang et al. (ACL 2025), Table 7: majority, minority, virtual, average as printed, rank in LiveBench / Chatbot Arena.
TABLE_7 = {
    "Deepseek-v3": (8.25, 6.13, 7.70, 7.36, 1),
    "GPT-4o": (7.86, 6.65, 7.19, 7.23, 3),
    "Claude-Sonnet": (7.18, 6.61, 7.48, 7.09, 2),
    "4o-Mini": (6.84, 5.70, 5.52, 6.02, 4),
    "Claude-Haiku": (4.88, 5.42, 5.43, 5.24, 5),
}
POPULATIONS = ("majority", "minority", "virtual")


def score(assistant: str, population: str, person: str, value: float, seed: int = 0) -> EpisodeScore:
    return EpisodeScore(assistant, population, person, f"{population}/{person}/{seed}", value, "completed", "turn_limit")


def published() -> list[EpisodeScore]:
    """Two people of every population, one a point above and one a point below the printed mean."""
    return [
        score(name, population, f"{population}{sign}", row[k] + sign)
        for name, row in TABLE_7.items()
        for k, population in enumerate(POPULATIONS)
        for sign in (-1, 1)
    ]


def test_table_7_is_reproduced() -> None:
    found = results(
        published(), {name: name for name in TABLE_7}, 1, ranking=("arena", {n: -row[4] for n, row in TABLE_7.items()})
    )
    for row in found.rows:
        printed = TABLE_7[row.assistant]
        for k, population in enumerate(POPULATIONS):
            assert row.populations[population].mean == pytest.approx(printed[k])
        assert round(row.average.mean, 2) == printed[3]
    assert [row.assistant for row in found.rows] == list(TABLE_7)
    assert found.reference.spearman.mean == pytest.approx(0.90)
    assert spearman([row[3] for row in TABLE_7.values()], [-row[4] for row in TABLE_7.values()]) == pytest.approx(0.90)
    assert spearman_interval([row[3] for row in TABLE_7.values()], [-row[4] for row in TABLE_7.values()]).n == 5
    haiku = next(row for row in found.rows if row.assistant == "Claude-Haiku")
    assert haiku.gaps["minority-majority"].mean == pytest.approx(5.42 - 4.88)
    assert list(haiku.gaps) == ["minority-majority", "virtual-majority", "virtual-minority"]


def test_a_person_counts_once_whatever_their_seeds() -> None:
    scores = [score("a", "all", "ann", v, s) for s, v in enumerate((0.0, 4.0))] + [
        score("a", "all", "bob", 6.0, s) for s in (0, 1)
    ]
    assert results(scores, {"a": "a"}, 1).rows[0].average.mean == 4.0  # (2 + 6) / 2


def test_the_average_is_of_populations_not_of_episodes() -> None:
    scores = [score("a", "big", f"p{i}", 0.0) for i in range(8)] + [score("a", "small", f"q{i}", 10.0) for i in range(2)]
    row = results(scores, {"a": "a"}, 1).rows[0]
    assert row.average.mean == 5.0
    assert row.average.n == 10


def random_scores(rng: np.random.Generator, missing: bool = False) -> list[EpisodeScore]:
    found = []
    for population, people in (("x", 12), ("y", 9)):
        for person in range(people):
            base = rng.normal()
            for seed in range(2):
                for k, name in enumerate("abc"):
                    value = math.nan if missing and rng.random() < 0.1 else base + 0.5 * k + 0.3 * rng.normal()
                    found.append(score(name, population, f"{population}{person}", value, seed))
    return found


def test_intervals_agree_with_the_librarys_bootstrap() -> None:
    scores = random_scores(np.random.default_rng(0))
    table = Table.of(scores, ["a", "b", "c"])
    drawn = Resampled(table)
    for a, name in enumerate(table.assistants):
        own = [s for s in scores if s.assistant == name and s.population == "x"]
        library = mean_interval([s.value for s in own], [s.profile_id for s in own])
        low, high = np.quantile(drawn.means["x"][:, a], [0.025, 0.975])
        assert drawn.value["x"][a] == pytest.approx(library.value)
        assert (low, high) == pytest.approx((library.low, library.high), abs=0.06)
    sides = [[s for s in scores if s.assistant == name and s.population == "x"] for name in "ab"]
    ids = [[s.profile_id for s in side] for side in sides]
    library = paired_difference([s.value for s in sides[0]], ids[0], [s.value for s in sides[1]], ids[1])
    column = drawn.column(0, 1)
    assert drawn.value["x"][column] == pytest.approx(library.value)
    low, high = np.quantile(drawn.means["x"][:, column], [0.025, 0.975])
    assert (low, high) == pytest.approx((library.low, library.high), abs=0.08)
    assert high - low < 0.5 * (library.high - library.low + 1)  # paired: what people differ in is gone


def test_pairing_takes_out_what_people_differ_in() -> None:
    rng = np.random.default_rng(1)
    people = rng.normal(0, 10, size=30)
    scores = [
        score(n, "all", f"p{i}", v + (1 if n == "a" else 0) + 0.1 * rng.normal()) for n in "ab" for i, v in enumerate(people)
    ]
    found = results(scores, {"a": "a", "b": "b"}, 1)
    low, high = found.pairs[0].average.ci95
    assert 0.9 < low < 1 < high < 1.1
    low, high = found.rows[0].average.ci95
    assert high - low > 4


def test_what_is_missing_on_one_side_counts_on_neither() -> None:
    scores = [score("a", "all", "x", 5.0), score("a", "all", "y", 1.0), score("a", "all", "z", math.nan)]
    scores += [score("b", "all", "x", 4.0), score("b", "all", "y", math.nan), score("b", "all", "z", 9.0)]
    pair = results(scores, {"a": "a", "b": "b"}, 1).pairs[0]
    sign = 1 if pair.first == "a" else -1
    assert sign * pair.populations["all"].mean == 1.0
    assert sign * pair.average.mean == 1.0
    assert (pair.wins, pair.losses) == ((1, 0) if sign == 1 else (0, 1))
    assert pair.average.ci95 is None
    found = results(random_scores(np.random.default_rng(2), missing=True), dict.fromkeys("abc", ""), 1)
    assert all(pair.average.mean is not None for pair in found.pairs)


def test_a_seed_that_is_missing_on_one_side_counts_on_neither() -> None:
    scores = [score("a", "all", "x", 1.0, 0), score("a", "all", "x", math.nan, 1), score("b", "all", "x", 0.0, 0)]
    pair = results([*scores, score("b", "all", "x", 10.0, 1)], {"a": "a", "b": "b"}, 1).pairs[0]
    sign = 1 if pair.first == "a" else -1
    assert sign * pair.populations["all"].mean == sign * pair.average.mean == 1.0


def test_a_population_of_one_person_has_no_interval_and_leaves_the_average_none() -> None:
    scores = [score("a", "big", f"p{i}", float(i)) for i in range(8)] + [score("a", "small", "q", 10.0)]
    row = results(scores, {"a": "a"}, 1).rows[0]
    assert row.average.mean == 6.75
    assert row.average.ci95 is None
    assert row.gaps["small-big"].mean == 6.5
    assert row.gaps["small-big"].ci95 is None
    assert row.populations["big"].ci95 is not None


def test_episodes_that_differ_cannot_be_compared() -> None:
    scores = [score("a", "all", "x", 1.0), score("b", "all", "y", 1.0)]
    with pytest.raises(SpecError, match="same episodes"):
        results(scores, {"a": "a", "b": "b"}, 1)
    with pytest.raises(SpecError, match="same episodes"):
        results([scores[0], scores[0], score("b", "all", "x", 1.0)], {"a": "a", "b": "b"}, 1)


def test_elo_does_not_depend_on_the_order_of_matches_or_assistants() -> None:
    scores = random_scores(np.random.default_rng(3))
    first = {row.assistant: row.elo.mean for row in results(scores, dict.fromkeys("abc", ""), 1).rows}
    random.Random(0).shuffle(scores)
    again = {row.assistant: row.elo.mean for row in results(scores, dict.fromkeys("cab", ""), 1).rows}
    assert again == pytest.approx(first, abs=1e-6)
    assert first["c"] > first["b"] > first["a"]
    assert sum(first.values()) / 3 == pytest.approx(1000)
    outcomes = [("a", "b", 1.0), ("b", "c", 0.0), ("a", "c", 0.5), ("c", "a", 1.0)] * 5
    straight = elo(outcomes)
    random.Random(1).shuffle(outcomes)
    assert elo(outcomes) == pytest.approx(straight, abs=1e-6)


@pytest.mark.parametrize("prior", [0.5, 2.0])
def test_newton_finds_the_ratings_of_the_library(prior: float) -> None:
    rng = np.random.default_rng(4)
    outcomes = [(*rng.choice(list("abcd"), size=2, replace=False).tolist(), float(rng.choice([0, 0.5, 1, 1]))) for _ in range(60)]
    wins = np.zeros((4, 4))
    for first, second, outcome in outcomes:
        wins["abcd".index(first), "abcd".index(second)] += outcome
        wins["abcd".index(second), "abcd".index(first)] += 1 - outcome
    library = elo(outcomes, prior=prior)
    assert elo_ratings(wins, prior) == pytest.approx([library[name] for name in "abcd"], abs=1e-3)


def test_players_who_always_win_have_finite_ratings_in_order() -> None:
    ratings = elo_ratings(132.0 * np.triu(np.ones((10, 10)), 1))
    assert np.all(np.diff(ratings) < 0)
    assert np.isfinite(ratings).all()
    assert ratings + ratings[::-1] == pytest.approx(2000)  # as good above as below


def test_a_judges_outcomes_take_the_place_of_scores() -> None:
    scores = [score(name, "all", f"p{i}", 1.0) for name in "ab" for i in range(4)]
    wins = {("a", "b", f"all/p{i}/0"): (1.0, 1.0, 0.5, math.nan)[i] for i in range(4)}
    for specs in ({"a": "", "b": ""}, {"b": "", "a": ""}):
        found = results(scores, specs, 1, wins)
        pair = found.pairs[0]
        told = (pair.wins, pair.ties, pair.losses)
        assert told == ((2, 1, 0) if pair.first == "a" else (0, 1, 2))
        rating = {row.assistant: row.elo.mean for row in found.rows}
        assert rating["a"] > 1000 > rating["b"]


def test_ties_share_a_rank() -> None:
    scores = [score(name, "all", f"p{i}", v) for name, v in (("a", 1.0), ("b", 2.0), ("c", 2.0)) for i in range(3)]
    found = results(scores, dict.fromkeys("abc", ""), 1)
    assert [(pair.wins, pair.ties, pair.losses) for pair in found.pairs] == [(0, 3, 0), (3, 0, 0), (3, 0, 0)]
    assert [(row.assistant, row.rank) for row in found.rows] == [
        ("b", 1),
        ("c", 1),
        ("a", 3),
    ]


def test_a_reference_may_name_resolved_specs() -> None:
    scores = published()
    table = Table.of(scores, list(TABLE_7))
    specs = {name: f"openai:{name}" for name in TABLE_7}
    found = against({f"openai:{n}": 6 - row[4] for n, row in TABLE_7.items()}, "r", table, specs, Resampled(table))
    assert found.spearman.mean == pytest.approx(0.9)
    assert found.missing == []


def test_resampling_by_hand() -> None:
    columns = np.array([[[1.0, 3.0], [5.0, 5.0]], [[math.nan, 2.0], [math.nan, math.nan]]])
    draws = resample(columns, 4000, np.random.default_rng(0))
    assert set(np.unique(draws[:, 0])) <= {1.0, 2.0, 3.0, 3.5, 4.0, 5.0, 1.5, 2.5}
    assert np.nanmin(draws[:, 1]) == np.nanmax(draws[:, 1]) == 2.0
    assert np.isnan(draws[:, 1]).mean() == pytest.approx(0.25 + 0.5 * 0.25 + 0.25 * 0.25**2, abs=0.03)
    assert draws[:, 0].mean() == pytest.approx(3.5, abs=0.05)


def test_estimates() -> None:
    assert Estimate.of(Interval(1.0, 0.5, 2.0, 3)).excludes_zero
    assert not Estimate.of(Interval(1.0, -0.5, 2.0, 3)).excludes_zero
    none = Estimate.of(Interval(math.nan, math.nan, math.nan, 0), "why")
    assert asdict(none) == {"mean": None, "ci95": None, "n": 0, "reason": "why"}
    one = Estimate.of(Interval(1.0, math.nan, math.nan, 1))
    assert one.ci95 is None
    assert one.reason
    assert not one.excludes_zero
    json.dumps(asdict(one), allow_nan=False)
