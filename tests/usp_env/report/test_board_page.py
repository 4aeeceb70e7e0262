"""The page of a leaderboard, and which page `usp-env report` writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_card_page import make_card
from test_html import EVIL, Page, scriptless

from usp_env.cli import main
from usp_env.errors import RunDirectoryError, UspError
from usp_env.evaluation.leaderboard import Estimate, Leaderboard, Pair, Reference, Row, Score
from usp_env.report import board as page

pytest.importorskip("jinja2")

NONE = Estimate(None, None, 0, "no valid episode")


def at(mean: float, ci: tuple[float, float] | None = None) -> Estimate:
    return Estimate(mean, ci, 5, None if ci else "fewer than 2 people")


def make_row(name: str, rank: int, mean: float, **more: object) -> Row:
    row = Row(
        rank,
        name,
        name + "?t=1",
        at(mean, (mean - 1, mean + 1)),
        {"majority": at(mean, (mean - 1, mean + 1)), "virtual": at(mean)},
        {"majority-virtual": at(mean / 10, (-5.0, 5.0))},
        {"majority": [at(0.0, (0.0, 0.0)), at(mean, (mean - 1, mean + 1))], "virtual": [at(0.0), at(mean)]},
        at(1000 + mean, (900.0, 1100.0)),
        20,
        {},
        False,
        {"turn_limit": 20},
    )
    return replace(row, **more)  # type: ignore[arg-type]


def make_board(first: str = "good", second: str = "bad") -> Leaderboard:
    lost = {"invalid": {"infra_failure": 1, "user_failure": 2}, "marked": True, "gaps": {"majority-virtual": NONE}}
    pair = Pair(first, second, at(40.0, (30.0, 50.0)), {"majority": at(38.0, (20.0, 60.0)), "virtual": at(42.0)}, 7, 2, 1)
    return Leaderboard(
        "usp-bench-1+modified",
        ["n: 100 → 5"],
        {"user": "agenda", "turns": 2, "bank": "people", "split": "test", "n": 5, "seeds": [0]},
        {"majority": ["p1", "p2"], "virtual": ["p3"]},
        {"virtual": "the split has 1 profile"},
        Score("judge", "openai:m", "1-10"),
        Score("goal", "answer-v1", "%"),
        [make_row(first, 1, 60.0), make_row(second, 2, 20.0, **lost)],
        [pair],
        Reference("ref.json", at(1.0), [first], [second]),
        {"accuracy": 0.9},
        {"numpy": "2"},
    )


COST = {
    "good": {
        "majority": {"user": {"replies": 4, "prompt_tokens": 100, "seconds": 1.0, "usd": 0.25}},
        "virtual": {"user": {"replies": 3, "prompt_tokens": 1000, "seconds": 2.0, "usd": None}},
    }
}


def test_the_page_says_it_all() -> None:
    found = Page(page.render_board(make_board(), {"name": "mine"}, COST))
    told = " ".join(found.text.split())
    assert "mine: usp-bench-1+modified" in told
    assert "compare with no other run's: n: 100 → 5" in told
    assert "Score: judge by openai:m (1-10, higher is better)" in told
    assert "virtual: the split has 1 profile" in told
    assert "average60.0[59.0, 61.0] n 5" in told
    assert "virtual60.0fewer than 2 people n 5" in told
    assert "invalid⚠ 3 of 20: infra_failure 1, user_failure 2" in told
    assert "invalid0 of 20" in told
    assert "more than 2 % of the episodes are invalid" in told
    assert "Spearman to ref.json: 1.00 (fewer than 2 people), assistants 1, people 5. Not in it: bad." in told
    assert "accuracy0.9" in told
    assert "turn_limit 20" in told
    assert len([tag for tag in found.of("svg") if tag.get("class") == "plot"]) == 2
    assert [tag["title"] for tag in found.of("details") if tag.get("class") == "why" and "title" in tag] == ["no valid episode"]


def test_the_matrix_by_hand() -> None:
    board = make_board()
    field = page._versus(board, "good", "bad")
    turned = page._versus(board, "bad", "good")
    assert field is not None
    assert turned is not None
    assert page._versus(board, "good", "good") is None
    assert (field.told.mean, field.told.ci, field.told.sure, field.duels) == ("+40.0", "[+30.0, +50.0]", True, "7/2/1")
    assert (turned.told.mean, turned.told.ci, turned.duels) == ("−40.0", "[−50.0, −30.0]", "1/2/7")
    assert [part.mean for part in turned.parts] == ["−38.0", "−42.0"]
    text = page.render_board(board)
    assert text.count('class="num sure pos"') == text.count('class="num sure neg"') == 1
    unsure = replace(board, pairs=[replace(board.pairs[0], average=at(40.0, (0.0, 50.0)))])
    assert "num sure" not in page.render_board(unsure)


def test_curves_and_gaps_share_their_scales() -> None:
    board = make_board()
    first, second = (page.curves(board, name, {"good": "s0", "bad": "s1"}) for name in board.profiles)
    assert first is not None
    assert second is not None
    assert first.y_ticks == second.y_ticks
    assert [curve.name for curve in first.curves] == ["bad", "good"]  # the best on top
    assert first.curves[1].dots[1] == (
        326.0,
        pytest.approx(184 - 176 * 60 / 61, abs=0.1),
        False,
        "good, turn 2: 60.0 [59.0, 61.0] n 5",
    )
    assert first.curves[1].band
    assert not second.curves[1].band
    ((gap, rows),) = page.gaps(board)
    assert gap == "majority-virtual"
    assert rows[0][1].mean == 145.0  # 6 of -5…6 over 5…145
    assert rows[1][1].mean is None
    assert rows[1][2].why == "no valid episode"


def test_the_twin_has_a_column_where_there_is_one() -> None:
    board = make_board()
    assert "twin" not in Page(page.render_board(board)).text
    rows = [replace(board.rows[0], twin=at(12.5, (10.0, 15.0))), replace(board.rows[1], twin=NONE)]
    pairs = [replace(board.pairs[0], twin=at(7.5, (5.0, 9.0)))]
    both = replace(board, twin=Score("goal", "answer-v1-twin", "%"), rows=rows, pairs=pairs)
    told = " ".join(Page(page.render_board(both)).text.split())
    assert "goal, twin12.5[10.0, 15.0] n 5" in told
    assert "by answer-v1-twin (%)" in told
    turned = page._versus(both, "bad", "good")
    assert turned is not None
    assert [(part.label, part.mean, part.ci) for part in turned.parts][-1] == ("twin", "−7.5", "[−9.0, −5.0]")


def test_costs_are_added_up() -> None:
    assert page.costs(COST) == [("good", "user", "7", "1,100", "0", "3.0", "0.2500")]


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    board = replace(make_board(), twin=Score("goal", "answer-v1-twin", "%"))
    board = replace(board, rows=[replace(row, twin=at(1.0)) for row in board.rows])
    (tmp_path / "leaderboard.json").write_text(board.to_json(), "utf-8")
    assert page.read_board(tmp_path).to_json() == board.to_json()
    path = page.write_board_page(tmp_path)
    before = path.read_bytes()
    assert path == tmp_path / "report.html"
    assert page.write_board_page(tmp_path / "leaderboard.json").read_bytes() == before
    with pytest.raises(RunDirectoryError, match="exists"):
        page.write_board_page(tmp_path, path)


def test_damaged_boards_are_named(tmp_path: Path) -> None:
    with pytest.raises(UspError, match="expected a leaderboard"):
        page.write_board_page(tmp_path)
    for broken in ("rows", "score", "settings"):
        read = json.loads(make_board().to_json())
        del read[broken]
        (tmp_path / "leaderboard.json").write_text(json.dumps(read), "utf-8")
        with pytest.raises(UspError, match="damaged"):
            page.write_board_page(tmp_path)
    for broken in ("user", "seeds"):
        read = json.loads(make_board().to_json())
        del read["settings"][broken]
        (tmp_path / "leaderboard.json").write_text(json.dumps(read), "utf-8")
        with pytest.raises(UspError, match=f"damaged.*{broken}"):
            page.write_board_page(tmp_path)
    (tmp_path / "leaderboard.json").write_text("{", "utf-8")
    with pytest.raises(UspError, match="damaged"):
        page.write_board_page(tmp_path)


def test_every_field_of_a_hostile_board_is_escaped() -> None:
    board = make_board(EVIL, EVIL + '" onclick=x \ud800')
    evil = replace(
        board,
        protocol=EVIL,
        modified=[EVIL],
        settings={**board.settings, "user": EVIL, "bank": EVIL, "split": EVIL, EVIL: EVIL},
        profiles={"majority": [], "virtual": []},
        caps={"majority": EVIL},
        score=Score(EVIL, EVIL, EVIL),
        curve_score=Score(EVIL, EVIL, EVIL),
        judge={EVIL: EVIL},
        reference=replace(board.reference, source=EVIL, missing=[EVIL]),  # type: ignore[type-var]
        rows=[
            replace(row, endings={EVIL: 1}, invalid={EVIL: 1}, weights=EVIL, average=replace(NONE, reason=EVIL))
            for row in board.rows
        ],
    )
    text = page.render_board(evil, {"name": EVIL, EVIL: EVIL}, {EVIL: {"x": {EVIL: {"seconds": 1.0}}}})
    scriptless(text)


def test_one_assistant_and_none() -> None:
    board = make_board()
    alone = replace(board, rows=board.rows[:1], pairs=[], reference=None, judge=None, modified=[])
    told = Page(page.render_board(alone)).text
    assert "Differences" not in told
    assert "Spearman" not in told
    assert "compare with no other" not in told
    assert "Leaderboard" in Page(page.render_board(replace(alone, rows=[]))).text


@pytest.mark.parametrize("kind", ["card", "leaderboard", "run"])
def test_the_command_writes_the_page_of_what_is_there(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "card": ("card.json", json.dumps(make_card()), "usp-env quality card"),
        "leaderboard": ("leaderboard.json", make_board().to_json(), "usp-env leaderboard"),
        "run": ("transcripts.jsonl", "", "usp-env report"),
    }
    name, text, title = texts[kind]
    (tmp_path / name).write_text(text, "utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert f"– {title}</title>" in (tmp_path / "report.html").read_text("utf-8")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file()
