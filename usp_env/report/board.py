"""The leaderboard of a benchmark as one HTML file, without script.

usp-env report runs/bench          where runs/bench holds leaderboard.json: writes runs/bench/report.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from usp_env.errors import UspError
from usp_env.evaluation.card import COST
from usp_env.evaluation.leaderboard import BOARD, MOST_INVALID, Estimate, Leaderboard, Pair, Reference, Row, Score, turned
from usp_env.files import read_text
from usp_env.report.facts import fixed, interval
from usp_env.report.html import fill, place, read_run, run_facts
from usp_env.report.plots import Chart, Point, Series, Strip, chart, strips, style


class Told(NamedTuple):
    """An estimate as text: a mean (or a dash), its interval, n, and what is missing and why."""

    label: str
    mean: str
    ci: str
    n: int
    why: str
    sure: bool


class Place(NamedTuple):
    """An assistant's row of the table."""

    row: Row
    average: Told
    twin: Told | None
    cells: Sequence[Told]
    elo: Told
    invalid: str


class Versus(NamedTuple):
    """A field of the matrix: an assistant less another; `duels` are wins, ties and losses, `parts` the populations."""

    told: Told
    duels: str
    parts: Sequence[Told]


def find_board(path: Path) -> Path | None:
    """The leaderboard of a benchmark's directory, or the file itself; None where there is none."""
    file = path / BOARD if path.is_dir() else path
    return file if file.name == BOARD and file.is_file() else None


def read_board(path: str | Path) -> Leaderboard:
    """The leaderboard in a file, or in a benchmark's directory.

    Raises:
        UspError: There is none, or it is damaged.
    """
    file = find_board(Path(path))
    if file is None:
        raise UspError(f"expected a leaderboard at {str(path)!r}, found none: usp-env benchmark --out {path} makes it")
    try:
        return _board(json.loads(read_text(file, UspError)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UspError(f"{file}: expected a leaderboard, it is damaged ({type(error).__name__}: {error})") from error


def _board(read: Mapping[str, Any]) -> Leaderboard:
    def named(values: Mapping[str, Any]) -> dict[str, Estimate]:
        return {name: Estimate(**value) for name, value in values.items()}

    def estimate(value: Mapping[str, Any] | None) -> Estimate | None:
        return None if value is None else Estimate(**value)

    rows = [
        Row(
            **{
                **row,
                "average": Estimate(**row["average"]),
                "elo": Estimate(**row["elo"]),
                "twin": estimate(row.get("twin")),
                "populations": named(row["populations"]),
                "gaps": named(row["gaps"]),
                "curves": {name: [Estimate(**point) for point in points] for name, points in row["curves"].items()},
            }
        )
        for row in read["rows"]
    ]
    pairs = [
        Pair(
            **{
                **pair,
                "average": Estimate(**pair["average"]),
                "populations": named(pair["populations"]),
                "twin": estimate(pair.get("twin")),
            }
        )
        for pair in read["pairs"]
    ]
    known = read.get("reference")
    reference = known and Reference(**{**known, "spearman": Estimate(**known["spearman"])})
    scores = {name: Score(**read[name]) for name in ("score", "curve_score")}
    twin = Score(**read["twin"]) if read.get("twin") else None
    return Leaderboard(**{**read, "twin": twin, "rows": rows, "pairs": pairs, "reference": reference, **scores})


def write_board_page(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a benchmark.

    Args:
        path: Its directory, or its `leaderboard.json`; `run.json` and `cost.json` are read too.
        out: Where to; default `report.html` in the directory, which is replaced.

    Returns:
        The file.

    Raises:
        UspError: There is no leaderboard, or it is damaged.
        RunDirectoryError: `out` exists.
        MissingExtraError: Jinja2 is not installed.
    """
    board = read_board(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    target = place(folder / "report.html", out)
    cost = json.loads(read_text(folder / COST, UspError)) if (folder / COST).is_file() else {}
    try:
        page = render_board(board, {"name": folder.resolve().name, **read_run(folder)}, cost)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UspError(f"{folder / BOARD}: expected a leaderboard, it is damaged ({type(error).__name__}: {error})") from error
    target.write_text(page, "utf-8", newline="\n")
    return target


def render_board(board: Leaderboard, run: Mapping[str, Any] | None = None, cost: Mapping[str, Any] | None = None) -> str:
    """The page. The same input gives the same text.

    Args:
        board: See there.
        run: What `run.json` holds, and perhaps a `name`.
        cost: What `cost.json` holds.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    run = run or {}
    names = [row.assistant for row in board.rows]
    styles = {name: style(index) for index, name in enumerate(names)}
    return fill(
        "board.html.j2",
        name=run.get("name") or "benchmark",
        board=board,
        most=f"{MOST_INVALID:.0%}".replace("%", " %"),
        populations=list(board.profiles),
        places=[_place(row, board) for row in board.rows],
        charts=[plot for population in board.profiles if (plot := curves(board, population, styles))],
        legends=list(styles.items()),
        gaps=gaps(board),
        names=names,
        matrix=[(first, [_versus(board, first, second) for second in names]) for first in names] if board.pairs else [],
        reference=board.reference and tell(board.reference.spearman, digits=2),
        costs=costs(cost or {}),
        facts=run_facts({"config": board.settings, **run}, board.versions),
    )


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def tell(estimate: Estimate, label: str = "", sign: str = "", digits: int = 1) -> Told:
    """An estimate as text.

    Example:
        >>> tell(Estimate(2.0, (-0.5, 4.0), 9), sign="+")
        Told(label='', mean='+2.0', ci='[−0.5, +4.0]', n=9, why='', sure=False)
    """
    mean, ci = fixed(estimate.mean, digits, sign), interval(estimate.ci95, digits, sign)
    return Told(label, mean, ci, estimate.n, estimate.reason or "", estimate.excludes_zero)


def _place(row: Row, board: Leaderboard) -> Place:
    lost = ", ".join(f"{outcome} {n}" for outcome, n in row.invalid.items())
    told = f"{sum(row.invalid.values())} of {row.episodes}" + (f": {lost}" if lost else "")
    cells = [tell(row.populations[name], name) for name in board.profiles]
    twin = None if board.twin is None else tell(row.twin or Estimate(None, None, 0))
    return Place(row, tell(row.average), twin, cells, tell(row.elo, digits=0), told)


def _versus(board: Leaderboard, first: str, second: str) -> Versus | None:
    """None on the diagonal."""
    pair = next((pair for pair in board.pairs if {pair.first, pair.second} == {first, second}), None)
    if pair is None:
        return None
    wins, losses = (pair.wins, pair.losses) if pair.first == first else (pair.losses, pair.wins)
    parts = [tell(board.difference(first, second, name), name, "+") for name in board.profiles]
    if pair.twin is not None:
        parts.append(tell(pair.twin if pair.first == first else turned(pair.twin), "twin", "+"))
    return Versus(tell(board.difference(first, second), second, "+"), f"{wins}/{pair.ties}/{losses}", parts)


def costs(cost: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> list[tuple[str, ...]]:
    """Assistant, speaker, replies, tokens read and written, seconds, dollars; populations are added up."""
    rows = []
    for assistant, populations in cost.items():
        for role in dict.fromkeys(role for accounts in populations.values() for role in accounts):
            own = [accounts[role] for accounts in populations.values() if role in accounts]
            counts = (sum(a.get(key) or 0 for a in own) for key in ("replies", "prompt_tokens", "completion_tokens"))
            usd = [a["usd"] for a in own if a.get("usd") is not None]
            money = f"{sum(usd):.4f}" if usd else "–"
            rows.append((assistant, role, *(f"{n:,}" for n in counts), f"{sum(a['seconds'] for a in own):.1f}", money))
    return rows


# ── curves ───────────────────────────────────────────────────────────────────────────────────────


def curves(board: Leaderboard, population: str, styles: Mapping[str, str]) -> Chart | None:
    """The score after each turn, a line per assistant; all populations share a scale."""
    every = [point for row in board.rows for points in row.curves.values() for point in points]
    ends = [v for point in every for v in (point.mean, *(point.ci95 or ())) if v is not None]
    series = [
        Series(
            row.assistant, styles[row.assistant], [_point(row.assistant, k, p) for k, p in enumerate(row.curves[population], 1)]
        )
        for row in reversed(board.rows)  # the best is drawn last, on top
    ]
    score = board.curve_score
    limits = (min(0.0, *ends), max(0.0, *ends)) if len(ends) > 1 else None
    return chart(population, series, ("user turn", f"{score.name}, {score.unit}"), y_limits=limits)


def _point(assistant: str, turn: int, estimate: Estimate) -> Point:
    told = tell(estimate)
    low, high = estimate.ci95 or (None, None)
    return Point(turn, estimate.mean, f"{assistant}, turn {turn}: {told.mean} {told.ci} n {told.n}", low, high)


def gaps(board: Leaderboard) -> list[tuple[str, list[tuple[str, Strip, Told]]]]:
    """Gap to its assistants with their intervals; all gaps share a scale."""
    names = list(board.rows[0].gaps) if board.rows else []
    drawn = iter(strips([(row.gaps[gap].mean, row.gaps[gap].ci95) for gap in names for row in board.rows]))
    return [(gap, [(row.assistant, next(drawn), tell(row.gaps[gap], gap, "+")) for row in board.rows]) for gap in names]
