"""The detector's calibration and the map of people, as the card holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_doubles import candidate, echo, make_people, make_plan, make_scorers, real_turns, talk

from usp_env.evaluation import figures
from usp_env.evaluation.card import read_card
from usp_env.evaluation.people import Person, person
from usp_env.evaluation.run import evaluate
from usp_env.evaluation.scorers import Scorer
from usp_env.profiles import Profile, ProfileBank
from usp_env.sampling import DensitySampler


def pairs() -> list[Person]:
    """Two people; each one's turn is as long as the other's reply."""
    said = (talk("a" * 40, "B" * 50), talk("b" * 50, "A" * 40))
    return [person(Profile(f"p{k}", "You ask.", "You write."), one) for k, one in enumerate(said)]


def test_calibration_by_hand() -> None:
    def lower(texts: list[str]) -> np.ndarray:
        return np.array([0.92 if text[0] == "a" else 0.98 if text[0] == "b" else 0.32 for text in texts])

    main, twin = figures.calibration(pairs(), Scorer(lower, "lower", lambda texts: np.full(len(texts), 0.5), "twin"))
    assert (main["scorer"], main["n"], main["people"]) == ("lower", 4, 2)
    assert [(one["low"], one["high"], one["n"], one["predicted"], one["share"]) for one in main["bins"]] == [
        (30, 40, 2, 32, 0),
        (90, 100, 2, 95, 100),
    ]
    assert main["ece"] == pytest.approx((32 * 2 + 5 * 2) / 4)
    assert main["bins"][0]["ci95"] == [0, pytest.approx(65.76, abs=0.01)]  # 1.96² / (2 + 1.96²), two conversations
    assert (twin["scorer"], twin["ece"], len(twin["bins"]), twin["bins"][0]["share"]) == ("twin", 0, 1, 50)


def test_no_pairs_no_calibration() -> None:
    assert figures.calibration(pairs()[:1], make_scorers().human) == []


@pytest.fixture(scope="module")
def sampler() -> DensitySampler:
    rng = np.random.default_rng(0)
    bank = ProfileBank([Profile(f"p{k}", f"You want {k}.", "You write.") for k in range(20)], "twenty")
    with pytest.warns(UserWarning, match="PCA"):
        return DensitySampler(embedder=lambda texts: rng.normal(size=(len(texts), 4)) * [4, 2, 0.1, 0.1]).fit(bank)


def test_the_map_holds_people_where_the_sampler_puts_them(sampler: DensitySampler) -> None:
    people = [person(profile, talk("hi", "hello")) for profile in list(sampler.bank)[3:5]]
    found = figures.population_map(people, sampler)
    assert (found["layout"], found["profiles"], list(found["people"])) == ("pca", 20, ["p3", "p4"])
    assert found["people"]["p4"] == pytest.approx(sampler.coordinates_[4].tolist(), abs=1e-4)
    rows, held = found["shades"], np.zeros(len(figures.HELD) + 1)
    assert len({len(row) for row in rows}) == 1
    (left, right), (bottom, top) = found["x"], found["y"]
    border = [rows[0], rows[-1], [row[0] for row in rows], [row[-1] for row in rows]]
    assert {cell for side in border for cell in side} == {"0"}  # it has faded there
    assert any(row[figures.ROOM] == "1" for row in rows)  # and not long before
    for x, y in sampler.coordinates_:  # in the cells themselves: the highest row is the first
        cell = rows[int((top - y) / (top - bottom) * len(rows))][int((x - left) / (right - left) * len(rows[0]))]
        held[: int(cell) + 1] += 1
    assert held[1:] / 20 == pytest.approx([share / 100 for share in figures.HELD], abs=0.1)


def test_the_card_of_a_run_has_both(sampler: DensitySampler, tmp_path: Path) -> None:
    own = [person(profile, who.dialogue) for profile, who in zip(sampler.bank, pairs(), strict=False)]
    plan = make_plan(own, sampler=sampler, levels=("utterance",))
    card = evaluate([candidate("replay", real_turns(own))], echo(), plan, make_scorers(), tmp_path / "x")
    assert list(card["map"]["people"]) == ["p0", "p1"]
    assert [one["scorer"] for one in card["calibration"]] == ["short", "short-twin"]
    assert read_card(tmp_path / "x") == card
    told = (tmp_path / "x" / "card.md").read_text("utf-8")
    assert f"Calibration error (ECE) on {card['calibration'][0]['n']} real texts paired by length: `short` " in told


def test_without_a_fitted_sampler_there_is_no_map(tmp_path: Path) -> None:
    people = make_people(2)
    plan = make_plan(people, levels=("utterance",))
    assert "map" not in evaluate([candidate("replay", real_turns(people))], echo(), plan, make_scorers(), tmp_path / "x")
