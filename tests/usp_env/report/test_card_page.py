"""The page of a quality card."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from test_html import EVIL, Page, scriptless

from usp_env.errors import RunDirectoryError, UspError
from usp_env.evaluation.card import LEVELS, NEIGHBOUR, REAL, not_measured
from usp_env.report import card as page
from usp_env.report import card_plots, plots

pytest.importorskip("jinja2")

WHY = "no judge: name one"


def entry(mean: float, ci: list[float] | None, **more: Any) -> dict[str, Any]:
    return {"mean": mean, "ci95": ci, "n": 9, "scorer": "minilm", "unit": "u", "higher_is_better": True, **more}


def against(other: str, difference: float, ci: list[float]) -> dict[str, Any]:
    return {
        "against": other,
        "difference": difference,
        "ci95": ci,
        "ratio": 1.5,
        "n": 8,
        "minimum_detectable_effect": 7.25,
        "twin": {"against": other, "difference": 1.0, "ci95": None, "ratio": None, "n": 8, "minimum_detectable_effect": None},
    }


def make_card(first: str = "a", second: str = "b") -> dict[str, Any]:
    """`first` leads surely in sem_sim, by chance in ava; `second` surely in esr, where lower is better."""
    curve = {"percentiles": [0, 50, 100], "curve": [0.0, 2.0, 4.0], "mark": 60, "at_mark": 2.5, "at_mark_ci95": [1, 3]}
    drift = {"turns": [90.0, None, 50.0], "dialogues": [4, 4, 1]}
    means = {first: (60.0, 50.0, 9.0), second: (40.0, 40.0, 3.0)}
    gaps = {
        first: {
            "sem_sim": [against(second, 20.0, [10.0, 30.0])],
            "ava": [against(second, 10.0, [-1.0, 21.0])],
            "esr": [against(second, 6.0, [2.0, 8.0])],
        },
        second: {
            "sem_sim": [against(first, -20.0, [-30.0, -10.0])],
            "ava": [against(first, -10.0, [-21.0, 1.0])],
            "esr": [against(first, -6.0, [-8.0, -2.0])],
        },
    }
    users: dict[str, Any] = {}
    for user in (first, second, REAL, NEIGHBOUR):
        sim, ava, esr = means.get(user, (95.0, 99.0, 0.0))
        metrics = {
            "sem_sim": entry(sim, [sim - 1, sim + 1], twin=entry(sim / 2, [1.0, 2.0]), note="odd turns"),
            "ava": entry(ava, None),
            "sc_score": not_measured(WHY),
            "drift": entry(-1.0, [-2.0, 0.5], detail=drift),
            "esr": entry(esr, [0.0, 1.0]),
            "adv": entry(2.0, None, detail=curve),
            "collapse": entry(0.0, None, detail={"alarm": user == first, "p_value": 0.5}),
            "mattr": not_measured(f"only {user}") if user != REAL else entry(70.0, None),
        }
        users[user] = {
            "spec": user + "?x=1",
            "profile": user != second,
            "invalid": {level: {"infra_failure": 2} if user == first else {} for level in LEVELS} if user in means else {},
            "jobs": dict.fromkeys(LEVELS, 18) if user in means else {},
            "utterance": {"sem_sim": metrics["sem_sim"]},
            "conversation": metrics,
            "differences": {"conversation": gaps[user]} if user in gaps else {},
        }
    return {
        "users": users,
        "bank": "people",
        "split": "val",
        "people": {"n": 9, "of": 12, "sha256": "x"},
        "assistant": "echo",
        "seeds": [0, 1],
        "turns": 3,
        "protocol": "ours",
        "judge": None,
        "scorers": {"embed": ["minilm", None]},
        "versions": {"numpy": "2"},
        "invalid": {"infra_failure": 4},
    }


def figures(scorer: str = "human", person: str = "p1") -> dict[str, Any]:
    """What newer cards hold besides: a detector with two bins, and a map of 2 by 3 cells."""
    bins = [
        {"low": 0.0, "high": 10.0, "n": 4, "predicted": 5.0, "share": 25.0, "ci95": [0.0, 50.0]},
        {"low": 90.0, "high": 100.0, "n": 6, "predicted": 95.0, "share": 100.0, "ci95": [75.0, 100.0]},
    ]
    return {
        "calibration": [{"scorer": scorer, "n": 10, "people": 3, "ece": 11.0, "bins": bins}],
        "map": {
            "layout": "umap",
            "profiles": 102,
            "held": [95, 50],
            "x": [0.0, 3.0],
            "y": [0.0, 2.0],
            "shades": ["011", "121"],
            "people": {person: [1.5, 0.5]},
        },
    }


SCORES = [
    {"user": "a", "level": "conversation", "user_turns": 1.0},
    {"user": "a", "level": "conversation", "user_turns": 3.0},
    {"user": "a", "level": "conversation", "user_turns": None},
    {"user": "a", "level": "utterance", "turns": 2, "user_turns": 2.0},
    {"user": REAL, "level": "conversation", "user_turns": 2.0},
]
COST = {
    "users": {"a": {"conversation": {"user": {"replies": 1234, "prompt_tokens": None, "seconds": 1.25, "usd": 0.5}}}},
    "scoring_seconds": 3.0,
}


def line(card: Any, label: str) -> page.Line:
    return next(found for found in page.lines(card, "conversation") if found.label == label)


def test_the_best_is_marked_only_where_the_interval_excludes_0() -> None:
    card = make_card()
    assert {found.label: [cell.best for cell in found.cells] for found in page.lines(card, "conversation")} == {
        "Sem-Sim": [True, False, False, False],
        "AVA": [False] * 4,
        "SC.Score": [False] * 4,
        "Drift from profile": [False] * 4,
        "ESR": [False, True, False, False],
        "ADV": [False] * 4,
        "Spread between people": [False] * 4,
        "MATTR": [False] * 4,
    }
    gaps = card["users"]["a"]["differences"]["conversation"]["sem_sim"]
    card["users"]["a"]["conversation"]["sem_sim"]["mean"] = 30.0  # means are over what each was judged by; pairs decide
    assert line(card, "Sem-Sim").cells[0].best
    gaps.append(against("c", 30.0, [0.0, 60.0]))  # one rival of several that is not surely behind
    assert not any(cell.best for cell in line(card, "Sem-Sim").cells)
    gaps[1]["ci95"] = [1.0, 60.0]
    assert line(card, "Sem-Sim").cells[0].best
    found = [(gap.against, gap.headline) for gap in page.gaps(card, "conversation") if gap.user == "a" and "Sem" in gap.label]
    assert found == [("b", True), ("c", False)]


def test_few_people_are_no_best() -> None:
    card = make_card()
    card["users"]["a"]["conversation"]["sem_sim"]["n"] = 8  # of 9: less than 90 %
    assert not any(cell.best for cell in line(card, "Sem-Sim").cells)


def test_users_with_many_losses_are_marked_at_their_level() -> None:
    card = make_card()
    del card["users"]["b"]["invalid"]["utterance"]
    told = " ".join(Page(page.render_card(card)).text.split())
    for lost in ("turns", "conversations"):
        assert f"⚠ more than 2 % of the {lost} are invalid: a. " in told  # 2 of 18
    card["users"]["a"]["jobs"] = {"utterance": 99, "conversation": 100}  # 2 of 99 are more than 2 %
    text = page.render_card(card)
    assert ("of the turns are invalid: " in text, "of the conversations are invalid: " in text) == (True, False)
    assert text.count("⚠ invalid") == 1
    card["users"]["a"]["jobs"]["utterance"] = 100
    assert "⚠" not in page.render_card(card)


def test_where_a_user_ended_stands_in_its_cell() -> None:
    card = make_card()
    card["users"]["a"]["conversation"]["sem_sim"]["detail"] = {"turns": 12345, "ended": 0}
    assert line(card, "Sem-Sim").cells[0].extra == "turns 12,345, ended instead 0"
    assert line(card, "Drift from profile").cells[0].extra == ""  # its `turns` are a curve


def test_cells_by_hand() -> None:
    first = line(make_card(), "Sem-Sim").cells[0]
    assert first == page.Cell("a", "60.00", "[59.00, 61.00]", 9, "30.00 [1.00, 2.00]", best=True)
    assert line(make_card(), "Drift from profile").cells[0][1:3] == ("−1.00", "[−2.00, 0.50]")
    assert [cell.real for cell in line(make_card(), "AVA").cells] == [False, False, True, True]
    assert line(make_card(), "SC.Score").reason == WHY
    assert line(make_card(), "MATTR").reason == ""
    card = make_card()
    card["users"][NEIGHBOUR]["conversation"].pop("sc_score")
    assert line(card, "SC.Score").reason == f"{WHY} (a, b, {REAL}); not measured of this row ({NEIGHBOUR})"
    assert [cell.why for cell in line(make_card(), "MATTR").cells] == ["only a", "only b", "", f"only {NEIGHBOUR}"]
    assert line(make_card(), "Spread between people").cells[0].alarm == "collapsed"
    assert line(make_card(), "ADV").cells[0].extra == "60th percentile 2.50 [1.00, 3.00]"


def test_notes_say_whom_they_are_about() -> None:
    card = make_card()
    assert line(card, "Sem-Sim").notes == ["odd turns"]
    for user in ("a", "b"):
        del card["users"][user]["conversation"]["sem_sim"]["note"]
    assert line(card, "Sem-Sim").notes == [f"{REAL}, {NEIGHBOUR}: odd turns"]


def test_differences_with_what_could_have_been_detected() -> None:
    found = page.gaps(make_card(), "conversation")
    assert found[0] == page.Gap("Sem-Sim ↑", "a", "b", "+20.00", "[+10.00, +30.00]", "+1.00", "1.50", "7.25", 8, "better", True)
    assert [gap.verdict for gap in found] == ["better", "worse", "", "", "worse", "better"]


def test_the_curves() -> None:
    styles = {"a": "s0", "b": "s1", REAL: "real", NEIGHBOUR: "near"}
    adv = card_plots.adv_chart(make_card(), styles)
    assert adv is not None
    # 0, 50 and 100 of 100 over 40…326; 0, 2 and 4 of 4 over 184…8
    assert adv.curves[0].path == "M40 184L183 96L326 8"
    drift, other = card_plots.drift_charts(make_card(), styles)
    assert drift is not None
    assert other is None
    assert drift.curves[0].path.count("M") == 2  # broken where nothing is known
    assert [hollow for _, _, hollow, _ in drift.curves[0].dots] == [False, True]
    turns = card_plots.turn_chart(SCORES, styles)
    assert turns is not None
    assert [curve.name for curve in turns.curves] == ["a", REAL]
    assert [told for *_, told in turns.curves[0].dots] == [
        "a, 1 user turns: 50 % of 2",
        "a, 2 user turns: 0 % of 2",
        "a, 3 user turns: 50 % of 2",
    ]
    assert card_plots.turn_chart([], styles) is None


def test_the_calibration_by_hand() -> None:
    drawn = card_plots.calibration_chart({**make_card(), **figures()}, {"a": "s0", "b": "s1"})  # type: ignore[typeddict-item]
    assert drawn is not None
    ideal, one = drawn.curves
    assert (ideal.path, ideal.dots) == ("M40 184L326 8", [])  # 0 to 100 over 40…326 and 184…8
    assert one.path == "M54.3 140L311.7 8"
    assert one.bars == "M54.3 96V184M311.7 8V52"
    assert one.band == ""
    assert [hollow for _, _, hollow, _ in one.dots] == [True, False]
    assert one.dots[0][3] == "human, P 0 to 10 %: mean 5.00, people's 25.00 [0.00, 50.00], 4 texts"
    assert drawn.key == [("human", "s2")]  # a style that no user has
    assert "(ECE): human 11.00 %. 10 texts of 3 real conversations" in drawn.note


def test_the_map_by_hand() -> None:
    drawn = card_plots.map_chart({**make_card(), **figures()})  # type: ignore[typeddict-item]
    assert drawn is not None
    # 2 units over 176 up, so 3 over 264 of the 286 across: a cell is 88 wide and high, the first begins 11 from the left.
    assert drawn.shades == ["M139 96H315V8H139zM51 184H315V96H51z", "M139 184H227V96H139z"]
    (people,) = drawn.curves
    assert (people.path, people.dots) == ("", [(183.0, 140.0, False, "person p1")])
    assert "Dots: the 1 evaluated people. Shades, from the inmost: where the densest 50 and 95 % of the 102" in drawn.note


def test_newer_figures_are_drawn_and_older_cards_do_without() -> None:
    old, new = make_card(), {**make_card(), **figures()}
    titles = "Calibration of the human-likeness detector", "Evaluated people on the density map"
    for card, shown in ((old, False), (new, True)):
        found = Page(page.render_card(card, {}, SCORES))
        told = " ".join(found.text.split())
        assert [title in told for title in titles] == [shown, shown]
        assert len([tag for tag in found.of("svg") if tag.get("class") == "plot"]) == 3 + 2 * shown
        assert "shades" not in told  # they are no settings of the run
    assert len([tag for tag in found.of("path") if tag.get("class") == "shade"]) == 2
    assert len([tag for tag in found.of("path") if str(tag.get("class")).startswith("bars")]) == 1


def test_charts_leave_out_what_is_no_number() -> None:
    points = [plots.Point(1, 5.0, "x", 4.0, 6.0), plots.Point(2, float("inf"), "y"), plots.Point(3, 5.0, "z", 4.0, 6.0)]
    drawn = plots.chart("t", [plots.Series("a", "s0", points)], ("x", "y"), y_limits=(5, 5))
    assert drawn is not None
    assert drawn.curves[0].path == "M40 96M326 96"
    assert "inf" not in drawn.curves[0].band
    assert plots.strips([(None, None)])[0].mean is None
    assert plots.ticks(-3, 7) == [-2.0, 0.0, 2.0, 4.0, 6.0]


def test_the_page_says_it_all() -> None:
    text = page.render_card(make_card(), {"name": "mine", "command": ["usp-env", "evaluate"]}, SCORES, COST)
    found = Page(text)
    told = " ".join(found.text.split())
    assert "mine: quality card" in told
    assert "9 of 12 people of people (val); assistant echo, at most 3 user turns; seeds 0, 1; protocol ours; no judge." in told
    assert "infra_failure 2" in told
    assert f"– not measured: {WHY}" in told
    whys = [details["title"] for details in found.of("details") if details.get("class") == "why"]
    assert whys == ["only a", "only b", f"only {NEIGHBOUR}"]
    assert "no profile" in told
    assert "1,234" in told
    assert "Scoring took 3.0 s." in told
    assert "usp-env evaluate" in told
    assert len([tag for tag in found.of("svg") if tag.get("class") == "plot"]) == 3


def test_every_field_of_a_hostile_card_is_escaped() -> None:
    evil = json.loads(json.dumps(make_card(EVIL, EVIL + '" onclick=x \ud800')).replace(WHY, "<img src=x>"))
    for key in ("bank", "split", "assistant", "protocol", "judge"):
        evil[key] = EVIL
    evil["users"][EVIL]["invalid"] = {EVIL: {EVIL: 1}}
    evil["users"][EVIL]["conversation"]["sem_sim"] |= {"scorer": EVIL, "note": EVIL, "unit": EVIL}
    evil |= figures(EVIL, EVIL)
    evil["map"]["layout"] = EVIL
    cost = {"users": {EVIL: {EVIL: {EVIL: {"seconds": 1.0}}}}, "scoring_seconds": EVIL}
    scores = [
        {"user": EVIL, "level": "conversation", "user_turns": 2},
        {"user": "else", "level": "conversation", "user_turns": 1},
    ]
    text = page.render_card(evil, {"name": EVIL, EVIL: EVIL}, scores, cost)
    found = scriptless(text)
    policy = next(meta["content"] for meta in found.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")
    assert "script-src" not in str(policy)


def test_one_user_alone_and_nothing_measured() -> None:
    card = make_card()
    for user in ("b", REAL, NEIGHBOUR):
        del card["users"][user]
    card["users"]["a"] |= {"differences": {}, "conversation": {"sem_sim": not_measured("none came"), "adv": not_measured("few")}}
    told = Page(page.render_card(card)).text
    assert "One user alone" in told
    assert "– not measured: none came" in told
    assert "Curves" not in told


def test_where_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(make_card()), "utf-8")
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SCORES), "utf-8")
    (tmp_path / "cost.json").write_text(json.dumps(COST), "utf-8")
    first = page.write_card_page(tmp_path)
    assert first == tmp_path / "report.html"
    before = first.read_bytes()
    assert page.write_card_page(tmp_path).read_bytes() == before
    assert b"Turn counts" in before
    assert page.write_card_page(tmp_path, tmp_path / "new.html").read_bytes() == before
    with pytest.raises(RunDirectoryError, match="exists"):
        page.write_card_page(tmp_path, tmp_path / "new.html")


def test_a_card_beside_its_run(tmp_path: Path) -> None:
    (tmp_path / "x" / "users").mkdir(parents=True)
    (tmp_path / "x" / "scores.jsonl").write_text(json.dumps(SCORES[0]) + "\n", "utf-8")
    assert page.find_card(tmp_path / "x") is None
    (tmp_path / "x.json").write_text(json.dumps(make_card()), "utf-8")
    assert page.find_card(tmp_path / "x") == tmp_path / "x.json"
    (tmp_path / "play").mkdir()  # a run of episodes beside something of its name
    (tmp_path / "play.json").write_text("{}", "utf-8")
    assert page.find_card(tmp_path / "play") is None
    for given in (tmp_path / "x", tmp_path / "x.json"):
        assert page.write_card_page(given) == tmp_path / "x.html"
        assert "Turn counts" in (tmp_path / "x.html").read_text("utf-8")


def test_damaged_cards_are_named(tmp_path: Path) -> None:
    with pytest.raises(UspError, match="expected a quality card"):
        page.write_card_page(tmp_path)
    whole = make_card()
    for broken in ("differences", "invalid", "conversation", "spec"):
        card = copy.deepcopy(whole)
        del card["users"]["a"][broken]
        (tmp_path / "card.json").write_text(json.dumps(card), "utf-8")
        with pytest.raises(UspError, match="damaged"):
            page.write_card_page(tmp_path)
    for broken in ("bank", "people", "seeds", "versions"):
        (tmp_path / "card.json").write_text(json.dumps({key: value for key, value in whole.items() if key != broken}), "utf-8")
        with pytest.raises(UspError, match=f"damaged.*{broken}"):
            page.write_card_page(tmp_path)
    for broken in ("calibration", "map"):
        (tmp_path / "card.json").write_text(json.dumps({**whole, broken: [{}]}), "utf-8")
        with pytest.raises(UspError, match="damaged"):
            page.write_card_page(tmp_path)
    assert not (tmp_path / "report.html").exists()
