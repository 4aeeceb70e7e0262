"""Entries, differences and intervals of the card, on values that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from evaluation_doubles import make_scorers

from usp_env.dialogue import Dialogue
from usp_env.evaluation import resampling, said, shape
from usp_env.evaluation.assemble import differences, entries, scores
from usp_env.evaluation.card import not_measured
from usp_env.evaluation.columns import Column, Measurement, Missing, Whole
from usp_env.evaluation.people import nearest, person
from usp_env.evaluation.resampling import jackknife, people_interval
from usp_env.metrics.diversity import first_turn_diversity
from usp_env.metrics.statistics import minimum_detectable_effect
from usp_env.profiles import Profile, ProfileBank

PEOPLE = ("ann", "ann", "bob", "bob")
NAN = math.nan


def column(*values: float, **settings) -> Column:
    return Column(np.array(values), "rule", **settings)


def measured(**metrics) -> Measurement:
    return Measurement(PEOPLE, metrics, {"infra_failure": 2})


def test_a_mean_is_over_people_and_in_hundreds() -> None:
    found = entries(measured(sem_sim=column(0.2, 0.4, 0.9, NAN)))["sem_sim"]
    assert found["mean"] == pytest.approx(60)  # (0.3 + 0.9) / 2
    assert found["n"] == 2
    assert found["ci95"] == pytest.approx([25, 90])  # .2 and .3 of ann, drawn twice; bob, drawn twice
    assert (found["unit"], found["higher_is_better"], found["scorer"]) == ("cosine x 100", True, "rule")


def test_turns_are_not_hundreds() -> None:
    found = entries(measured(user_turns=column(1, 3, 5, 7), drift=column(-0.01, -0.03, -0.02, -0.02)))
    assert found["user_turns"]["mean"] == 4
    assert found["user_turns"]["higher_is_better"] is None
    assert found["drift"]["mean"] == pytest.approx(-2)


def test_a_harmonic_mean_is_that_of_the_means() -> None:
    p, r = np.array([1.0, 1.0, 0.5, 0.5]), np.array([0.2, 0.2, 0.4, 0.4])
    own = column(*(2 * p * r / (p + r)), of="harmonic", parts=(p, r))
    assert entries(measured(r_dpc=own))["r_dpc"]["mean"] == pytest.approx(100 * 2 * 0.75 * 0.3 / 1.05, abs=1e-4)


def test_people_weigh_the_same_in_a_harmonic_mean() -> None:
    p, r = np.array([1.0, 1.0, 0.5, NAN]), np.array([0.2, 0.2, 0.4, NAN])  # bob's other dialogue came to nothing
    own = column(*(2 * p * r / (p + r)), of="harmonic", parts=(p, r))
    assert entries(measured(r_dpc=own))["r_dpc"]["mean"] == pytest.approx(100 * 2 * 0.75 * 0.3 / 1.05, abs=1e-4)


def test_an_f1_is_of_all_decisions_together() -> None:
    counts = (np.array([2.0, 0, 2, 0]), np.array([2.0, 1, 3, 0]))
    own = column(1, 0, 2 / 3, NAN, of="ratio", parts=counts)
    assert entries(measured(termination_f1=own))["termination_f1"]["mean"] == pytest.approx(100 * 4 / 6, abs=1e-4)


def test_what_has_no_value_is_no_zero() -> None:
    found = entries(
        measured(sem_sim=column(NAN, NAN, NAN, NAN), perplexity=Missing("not here"), ldl=Whole(NAN, NAN, NAN, 0, "x"))
    )
    assert found["sem_sim"] == not_measured("no dialogue has a value; invalid: infra_failure 2")
    assert found["perplexity"] == not_measured("not here")
    assert found["ldl"]["mean"] is None


def test_one_person_has_no_interval() -> None:
    found = entries(measured(sem_sim=column(0.5, 0.7, NAN, NAN)))["sem_sim"]
    assert (found["mean"], found["ci95"], found["n"]) == (60, None, 1)


def test_each_user_stands_against_every_other_the_hardest_first() -> None:
    users = {
        "good": measured(sem_sim=column(0.8, 0.8, 0.6, 0.6), esr=column(0, 0, 0, 0), user_turns=column(1, 1, 1, 1)),
        "mid": measured(sem_sim=column(0.5, 0.5, 0.5, 0.5), esr=column(0, 1, 0, 1)),
        "bad": measured(sem_sim=column(0.1, 0.1, 0.3, 0.3, twin=column(0, 0, 0, 0)), esr=column(1, 1, 1, 1)),
    }
    found = differences(users)
    gap, easier = found["good"]["sem_sim"]
    assert (easier["against"], easier["difference"]) == ("bad", pytest.approx(50))
    assert (gap["against"], gap["difference"], gap["ratio"], gap["n"]) == ("mid", pytest.approx(20), pytest.approx(1.4), 2)
    assert gap["ci95"] == pytest.approx([10, 30])
    expected = minimum_detectable_effect([0.3, 0.1], ["ann", "bob"], [0.0, 0.0], ["ann", "bob"])
    assert gap["minimum_detectable_effect"] == pytest.approx(100 * expected, abs=1e-4)
    assert [found[user]["sem_sim"][0]["against"] for user in ("mid", "bad")] == ["good", "good"]
    assert [(one["against"], one["difference"]) for one in found["good"]["esr"]] == [
        ("mid", -50),
        ("bad", -100),
    ]  # lower is better
    assert [(one["against"], one["difference"]) for one in found["mid"]["esr"]] == [("good", 50), ("bad", -50)]
    assert "user_turns" not in found["good"]
    assert "twin" not in gap


def test_the_hardest_rival_is_the_one_of_the_difference_not_of_the_means() -> None:
    people = tuple(f"p{k}" for k in range(10))

    def user(*values: float) -> Measurement:
        return Measurement(people, {"sem_sim": column(*values)})

    # "lacking" has no value for the person by whom everybody else loses: its mean is the best, and it does worst on the others.
    users = {"own": user(0, *[0.5] * 9), "even": user(0, *[0.5] * 9), "lacking": user(NAN, *[0.49] * 9)}
    found = differences(users)["own"]["sem_sim"]
    assert [(gap["against"], gap["difference"], gap["n"]) for gap in found] == [("even", 0, 10), ("lacking", pytest.approx(1), 9)]


def test_first_turns_that_a_rival_was_given_are_left_out_on_both_sides() -> None:
    def user(mean: float, later: float | None) -> Measurement:
        rest = None if later is None else measured(sem_sim=column(*[later] * 4))
        return replace(measured(sem_sim=column(*[mean] * 4)), later=rest)

    found = differences({"own": user(0.9, 0.3), "other": user(0.7, 0.6), "free": user(0.5, None)})
    gaps = {user: {gap["against"]: gap["difference"] for gap in own["sem_sim"]} for user, own in found.items()}
    assert gaps == {
        "own": {"free": -20, "other": pytest.approx(20)},
        "other": {"own": pytest.approx(-20), "free": pytest.approx(10)},
        "free": {"other": pytest.approx(-10), "own": 20},
    }
    assert [gap["against"] for gap in found["own"]["sem_sim"]] == ["free", "other"]


def test_a_margin_over_less_than_nothing_is_not_given() -> None:
    users = {"a": measured(style_sim=column(0.4, 0.4, 0.4, 0.4)), "b": measured(style_sim=column(-0.1, -0.1, -0.1, -0.1))}
    gap = differences(users)["a"]["style_sim"][0]
    assert (gap["difference"], gap["ratio"]) == (50, None)


def test_nor_where_both_are_less_than_nothing() -> None:
    users = {"a": measured(drift=column(-0.02, -0.02, -0.04, -0.04)), "b": measured(drift=column(-0.01, -0.01, -0.01, -0.01))}
    gap = differences(users)["a"]["drift"][0]
    assert (gap["difference"], gap["ratio"]) == (-2, None)  # 3 points a turn against 1: three times as bad, not as good


def test_what_never_varies_tells_no_detectable_effect() -> None:
    users = {name: measured(esr=column(0, 0, 0, 0), sem_sim=column(*values)) for name, values in (
        ("a", (0.3, 0.3, 0.2, 0.2)), ("b", (0.1, 0.1, 0.0, 0.0)),
    )}  # fmt: skip
    for name in ("esr", "sem_sim"):
        assert differences(users)["a"][name][0]["minimum_detectable_effect"] is None


def test_differences_of_harmonic_means() -> None:
    def user(p: tuple[float, float], r: tuple[float, float]) -> Measurement:
        parts = (np.array(p), np.array(r))
        return Measurement(("ann", "bob"), {"r_dpc": column(0, 0, of="harmonic", parts=parts)})

    gap = differences({"a": user((1, 0.5), (0.2, 0.4)), "b": user((0.3, 0.3), (0.3, 0.3))})["a"]["r_dpc"][0]
    assert gap["difference"] == pytest.approx(100 * (2 * 0.75 * 0.3 / 1.05 - 0.3), abs=1e-3)
    assert gap["ratio"] == pytest.approx(2 * 0.75 * 0.3 / 1.05 / 0.3, abs=1e-4)
    # Of ann twice, both, bob twice: 1/3, .42857 and 4/9, a quarter, a half and a quarter of the time.
    assert gap["ci95"] == pytest.approx([100 * (1 / 3 - 0.3), 100 * (4 / 9 - 0.3)], abs=1e-3)
    error = math.sqrt(np.average((np.array([1 / 3, 3 / 7, 4 / 9]) - 0.40873) ** 2, weights=[1, 2, 1]))
    assert gap["minimum_detectable_effect"] == pytest.approx(100 * 2.80158 * error, rel=0.1)


def test_differences_of_distances() -> None:
    def user(*counts: float) -> Measurement:
        found = shape.turn_counts(np.array([*counts, 9]), np.array([1.0, 5, 1]), np.array([True, True, False]), 10)
        return Measurement(("ann", "bob", "cy"), {"turn_count_distance": found})

    gap = differences({"a": user(3, 5), "b": user(7, 5)})["a"]["turn_count_distance"][0]
    # (3, 5) and (7, 5) against (1, 5): 1 and 3. Of ann alone 2 and 6, of bob alone 0 and 0.
    assert (gap["difference"], gap["ci95"], gap["ratio"], gap["n"]) == (-2, [-4, 0], 0.3333, 2)
    assert gap["minimum_detectable_effect"] == pytest.approx(2.80158 * math.sqrt(2), rel=0.1)


def test_differences_of_f1_resample_both_together() -> None:
    def user(*hits: float) -> Measurement:
        parts = (2 * np.array(hits), 2 * np.array(hits) + 1)
        return measured(termination_f1=column(*(parts[0] / parts[1]), of="ratio", parts=parts))

    users = {"a": user(1, 1, 1, 1), "b": user(0, 0, 0, 0)}
    gap = differences(users)["a"]["termination_f1"][0]
    assert gap["difference"] == pytest.approx(100 * 8 / 12, abs=1e-3)
    assert gap["ci95"] == pytest.approx([66.6667, 66.6667])
    assert gap["minimum_detectable_effect"] is None


def test_a_row_that_one_side_lacks_weighs_nobody_otherwise() -> None:
    people = ("ann", "bob", "cy") * 2
    whole = np.array([1, 0.2, 0.2, 1, 0.2, 0.2])
    lacking = np.where(np.arange(6) == 3, NAN, whole)  # ann's second dialogue came to nothing
    users = {
        name: Measurement(people, {"r_dpc": column(*values, of="harmonic", parts=(values, values))})
        for name, values in (("whole", whole), ("lacking", lacking))
    }
    for gap in differences(users).values():
        assert [(own["difference"], own["ci95"], own["n"]) for own in gap["r_dpc"]] == [(0, [0, 0], 3)]


def test_two_lucky_conversations_are_no_rival() -> None:
    people = tuple(f"p{k}" for k in range(20))

    def user(mean: float, n: int) -> Measurement:
        return Measurement(people, {"sem_sim": column(*(mean if k < n else NAN for k in range(20)))})

    users = {"best": user(0.5, 20), "most": user(0.4, 18), "lucky": user(0.9, 16)}
    found = differences(users)
    rivals = {name: [gap["against"] for gap in own["sem_sim"]] for name, own in found.items()}
    assert rivals == {"best": ["most"], "most": ["best"], "lucky": ["best", "most"]}
    pair = {name: users[name] for name in ("best", "lucky")}
    assert "sem_sim" not in differences(pair)["best"]


def test_the_spread_of_first_turns_is_that_of_pairs() -> None:
    people = [f"p{k}" for k in range(12)]
    texts = {"a": ["hi there"] * 5 + [f"word{k} and more" for k in range(7)], "b": [f"hi {k % 4} more" for k in range(12)]}

    def left_out(own: list[str]) -> np.ndarray:
        return np.array([first_turn_diversity(own[:k] + own[k + 1 :]).mean() for k in range(len(own))])

    def error(left: np.ndarray) -> float:
        return math.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())

    users = {
        name: Measurement(tuple(people), {"first_turn_diversity": shape._first_turns(own, [0] * 12)})
        for name, own in texts.items()
    }
    cards = {name: entries(own) for name, own in users.items()}
    for name, own in texts.items():
        entry = cards[name]["first_turn_diversity"]
        assert entry["mean"] == pytest.approx(100 * first_turn_diversity(own).mean(), abs=1e-4)
        assert (entry["ci95"][1] - entry["ci95"][0]) / 3.92 == pytest.approx(100 * error(left_out(own)), rel=0.15)
    gap = differences(users)["a"]["first_turn_diversity"][0]
    detectable = (1.959964 + 0.841621) * error(left_out(texts["a"]) - left_out(texts["b"]))  # the same person on both sides
    assert gap["minimum_detectable_effect"] == pytest.approx(100 * detectable, rel=1e-4)
    assert gap["difference"] == pytest.approx(
        cards["a"]["first_turn_diversity"]["mean"] - cards["b"]["first_turn_diversity"]["mean"]
    )
    assert isinstance(shape._first_turns(["hi", "ho"], [0, 0]), Missing)


def test_the_sensitivity_of_ava_is_over_people() -> None:
    pairs = [("hi", "hi"), ("hi", "HI"), ("hi", "HI"), ("hi", "HI"), ("hi", "hi"), ("hi", "hi")]
    generated, real = zip(*pairs, strict=True)
    people = ["ann", "bob", "bob"]
    ava = said.likeness(generated, real, [4, 1, 1], people, make_scorers())["ava"]
    expected = entries(Measurement(tuple(people), {"ava": ava}))["ava"]["mean"]
    assert expected == 62.5  # (1/4 + 1) / 2; over turns it is 50
    assert ava.detail["sensitivity"][said.SENSITIVITY.index(0.0)] == expected
    assert said.likeness([], [], [], [], make_scorers())["ava"].detail["sensitivity"] == [None] * 7


@pytest.mark.parametrize(("n", "k"), [(10, 8), (50, 48), (51, 48), (52, 49), (53, 50), (152, 50)])
def test_neighbours_are_as_many_with_a_group_left_out(n: int, k: int) -> None:
    points = np.random.default_rng(0).normal(size=(n, 3))
    found = shape._density(points, "e")["ldl"]
    assert isinstance(found, Whole)
    assert found.detail == {"k": k}
    assert k < n - math.ceil(n / resampling.GROUPS)


def test_rows_hold_what_each_person_got() -> None:
    rows = scores(
        "u", "conversation", measured(sem_sim=column(0.5, NAN, 0.25, 1, twin=column(0, 0, 0, 1)), perplexity=Missing("x"))
    )
    assert rows[0] == {"user": "u", "level": "conversation", "person": "ann", "sem_sim": 50, "sem_sim.twin": 0}
    assert rows[1]["sem_sim"] is None


def test_the_bootstrap_draws_people_and_their_rows_within() -> None:
    x = np.array([0.0, 1.0, 10.0, 11.0])
    seen: list[set[int]] = []

    def statistic(rows):
        seen.append(set(rows.tolist()))
        return float(x[rows].mean())

    found = people_interval(PEOPLE, statistic, replicates=400)
    assert found.value == 5.5
    assert (found.low, found.high) == (pytest.approx(0, abs=0.5), pytest.approx(11, abs=0.5))
    assert all(rows <= {0, 1} or rows <= {2, 3} or (rows & {0, 1} and rows & {2, 3}) for rows in seen)
    assert people_interval([], statistic).n == 0
    assert np.isnan(people_interval(["ann"], lambda rows: 1.0).low)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=(30, 1))
    found = jackknife(x, lambda points: float(points.mean()))
    assert (found.high - found.value) / 1.96 == pytest.approx(x.std(ddof=1) / np.sqrt(30))
    grouped = jackknife(x, lambda points: float(points.mean()), groups=10)
    assert (grouped.high - grouped.value) / 1.96 == pytest.approx(x.std(ddof=1) / np.sqrt(30), rel=0.5)


def test_turn_counts_are_compared_where_the_end_is_known() -> None:
    simulated, real = np.array([3.0, 9, 5, NAN]), np.array([1.0, 1, 5, 2])
    known = np.array([True, False, True, True])
    found = shape.turn_counts(simulated, real, known, 10)
    entry = entries(Measurement(("a", "b", "c", "d"), {"turn_count_distance": found}))["turn_count_distance"]
    assert (entry["mean"], entry["ci95"], entry["n"]) == (1, [0, 2], 2)  # (3, 5) against (1, 5)
    assert entry["detail"] == {"simulated_mean": 4.0, "real_mean": 3.0}
    assert "biased upward" in entry["note"]
    rows = scores("u", "conversation", Measurement(("a", "b", "c", "d"), {"turn_count_distance": found}))
    assert [row["turn_count_distance"] for row in rows] == [2, None, 0, None]
    assert isinstance(shape.turn_counts(simulated, real, known & False, 10), Missing)


def test_nobody_is_their_own_neighbour() -> None:
    bank = ProfileBank([Profile(f"p{k}", f"You ask about {word}.", "Terse.") for k, word in enumerate("abbaabba")])
    people = [person(profile, Dialogue.of([{"role": "user", "content": "hi"}])) for profile in bank]
    found = nearest(people, bank)
    assert len(found) == 8
    assert all(id != other for id, other in found.items())
    outside = [person(Profile("q", "You ask about b.", "Terse."), people[0].dialogue)]
    assert bank.get(nearest(outside, bank)["q"]).objective == "You ask about b."


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "REPLICATES", 200)
