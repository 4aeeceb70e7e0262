"""A quality card as one HTML file, without script: tables by level, plots, differences, what is missing and why.

usp-env report runs/x          where runs/x holds card.json: writes runs/x/report.html
usp-env report x.json          a card alone: writes x.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from usp_env.errors import UspError
from usp_env.evaluation.assemble import COVERED
from usp_env.evaluation.card import CARD, COST, LEVELS, METRICS, NEIGHBOUR, REAL, Card, Difference, Entry, Metric, read_card
from usp_env.evaluation.leaderboard import MOST_INVALID
from usp_env.evaluation.markdown import COMPARED, HEADLINE, JOBS, marked
from usp_env.evaluation.run import SCORES, USERS
from usp_env.files import read_text
from usp_env.report.card_plots import adv_chart, calibration_chart, drift_charts, map_chart, turn_chart
from usp_env.report.facts import fixed, interval
from usp_env.report.html import fill, place, read_run, run_facts
from usp_env.report.plots import style

EXTRA = {
    "simulated_mean": "mean",
    "real_mean": "real mean",
    "precision": "precision",
    "recall": "recall",
    "p_value": "p",
    "without_verdict": "without verdict",
    "turns": "turns",
    "ended": "ended instead",
}
"""Details of metrics that are shown in their cells, by name."""


class Cell(NamedTuple):
    """A user in a metric.

    Attributes:
        user: Whose.
        mean: The number, or a dash.
        ci: Its interval; empty without one.
        n: People that counted.
        twin: Mean and interval by the held-out scorer; empty without one.
        best: Best of the simulated users, by paired differences to all of its rivals whose intervals exclude 0.
        real: Whether real people stand there.
        alarm: What is alarming; else empty.
        extra: Other figures of this metric.
        why: Why there is no number; else empty.
    """

    user: str
    mean: str
    ci: str = ""
    n: int = 0
    twin: str = ""
    best: bool = False
    real: bool = False
    alarm: str = ""
    extra: str = ""
    why: str = ""


class Line(NamedTuple):
    """A metric at a level: its label, arrow and unit, who measured it, what to know, and a cell for each user.

    `reason` stands in the place of the cells where nobody has a number, all for the same reason.
    """

    label: str
    arrow: str
    unit: str
    scorer: str
    notes: Sequence[str]
    cells: Sequence[Cell]
    reason: str


class Gap(NamedTuple):
    """A difference as text; `verdict` is `better` or `worse` where its interval excludes 0, else empty.

    `headline`: to the hardest rival, in a metric that is shown first.
    """

    label: str
    user: str
    against: str
    difference: str
    ci: str
    twin: str
    ratio: str
    detectable: str
    n: int
    verdict: str
    headline: bool


def find_card(path: Path) -> Path | None:
    """The card of a run directory, beside one, or the file itself; None where there is none."""
    if path.is_file():
        return path if path.suffix == ".json" else None
    beside = path.with_name(f"{path.name}.json")
    if (path / CARD).is_file():
        return path / CARD
    return beside if (path / USERS).is_dir() and beside.is_file() else None


def write_card_page(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a card.

    Args:
        path: The card's file, or its run directory; `scores.jsonl` (turn counts), `cost.json` and `run.json` are read too.
        out: Where to; default `report.html` in the run directory, or the card's name with `.html`; it is replaced.

    Returns:
        The file.

    Raises:
        UspError: There is no card, or it is damaged.
        RunDirectoryError: `out` exists.
        MissingExtraError: Jinja2 is not installed.
    """
    file = find_card(Path(path)) or Path(path)
    folder = file.parent if file.name == CARD else file.with_suffix("")
    target = place(folder / "report.html" if file.name == CARD else file.with_suffix(".html"), out)
    card, run = read_card(file), read_run(folder)
    name = (folder if file.name == CARD else file).resolve().name
    try:
        page = render_card(card, {"name": name, **run}, _read_scores(folder / SCORES), _read_cost(folder / COST))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UspError(f"{file}: expected a quality card, it is damaged ({type(error).__name__}: {error})") from error
    target.write_text(page, "utf-8", newline="\n")
    return target


def _read_scores(file: Path) -> list[dict[str, Any]]:
    lines = read_text(file, UspError).split("\n") if file.is_file() else []
    return [json.loads(line) for line in lines if line]


def _read_cost(file: Path) -> dict[str, Any]:
    cost: dict[str, Any] = json.loads(read_text(file, UspError)) if file.is_file() else {}
    return cost


def render_card(
    card: Card,
    run: Mapping[str, Any] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
    cost: Mapping[str, Any] | None = None,
) -> str:
    """The page. The same input gives the same text.

    Args:
        card: See `usp_env.evaluation.card`.
        run: What `run.json` holds, and perhaps a `name`.
        scores: Lines of `scores.jsonl`, for the turn counts.
        cost: What `cost.json` holds.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    run, cost = run or {}, cost or {}
    users = [user for user in card["users"] if user not in (REAL, NEIGHBOUR)]
    styles = {user: style(index) for index, user in enumerate(users)} | {REAL: "real", NEIGHBOUR: "near"}
    curves = adv_chart(card, styles), *drift_charts(card, styles), turn_chart(scores, styles)
    charts = [plot for plot in (*curves, map_chart(card), calibration_chart(card, styles)) if plot]
    told = {key: value for key, value in card.items() if key not in ("users", "versions", "invalid", "calibration", "map")}
    return fill(
        "card.html.j2",
        name=run.get("name") or "card",
        card=card,
        users=users,
        specs={user: card["users"][user]["spec"] for user in users},
        compared=COMPARED,
        warned={level: [user for user in users if marked(card, user, level)] for level in LEVELS},
        jobs=JOBS,
        most=f"{MOST_INVALID:.0%}".replace("%", " %"),
        given={user: card["users"][user]["profile"] for user in users},
        levels=[(level, list(table_users(card, level)), lines(card, level)) for level in LEVELS],
        charts=charts,
        legends=[(user, styles[user]) for user in card["users"] if any(c.name == user for p in charts for c in p.curves)],
        gaps=[(level, gaps(card, level)) for level in LEVELS],
        invalid=invalid(card),
        costs=costs(cost.get("users", {})),
        scoring=cost.get("scoring_seconds"),
        facts=run_facts({"config": told, **run}, card["versions"]),
    )


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def table_users(card: Card, level: str) -> dict[str, Mapping[str, Entry]]:
    """Users, simulated and real, with their entries at a level."""
    return {user: row[level] for user, row in card["users"].items() if row[level]}  # type: ignore[literal-required]


def lines(card: Card, level: str) -> list[Line]:
    """The table of a level, in the card's order."""
    rows = table_users(card, level)
    return [_line(card, level, name, rows) for name in METRICS if any(name in row for row in rows.values())]


def _line(card: Card, level: str, name: str, rows: Mapping[str, Mapping[str, Entry]]) -> Line:
    metric, found = METRICS[name], {user: row[name] for user, row in rows.items() if name in row}
    best = best_user(card, level, name)
    cells = [_cell(user, found.get(user), user == best) for user in rows]
    scorer = " · ".join(dict.fromkeys(_scorer(entry) for entry in found.values() if entry["scorer"]))
    return Line(metric.label, metric.arrow, metric.unit, scorer, _notes(found), cells, _nobody(cells))


def _nobody(cells: Sequence[Cell]) -> str:
    """Why no cell has a number, if none has; with whose reason it is where they differ."""
    users: dict[str, list[str]] = {}
    for cell in cells:
        users.setdefault(cell.why, []).append(cell.user)
    if "" in users:
        return ""
    return "; ".join(why if len(users) == 1 else f"{why} ({', '.join(own)})" for why, own in users.items())


def _notes(found: Mapping[str, Entry]) -> list[str]:
    """What to know of a metric, with whom it is about where that is not everybody who was measured."""
    users: dict[str, list[str]] = {}
    for user, entry in found.items():
        if "note" in entry:
            users.setdefault(entry["note"], []).append(user)
    measured = sum(entry["mean"] is not None for entry in found.values())
    return [note if len(own) == measured else f"{', '.join(own)}: {note}" for note, own in users.items()]


def _scorer(entry: Entry) -> str:
    twin = entry.get("twin")
    return f"{entry['scorer']}, held out: {twin['scorer']}" if twin else str(entry["scorer"])


def _cell(user: str, entry: Entry | None, best: bool) -> Cell:
    real = user in (REAL, NEIGHBOUR)
    if entry is None or entry["mean"] is None:
        return Cell(user, "–", real=real, why=(entry and entry.get("reason")) or "not measured of this row")
    twin = entry.get("twin")
    told = "" if twin is None or twin["mean"] is None else f"{fixed(twin['mean'])} {interval(twin['ci95'])}".strip()
    detail = entry.get("detail", {})
    alarm = "collapsed" if detail.get("alarm") else ""
    extra = ", ".join(
        f"{label} {_plain(detail[key])}" for key, label in EXTRA.items() if isinstance(detail.get(key), int | float)
    )
    if detail.get("at_mark") is not None:
        extra = f"{detail['mark']}th percentile {fixed(detail['at_mark'])} {interval(detail.get('at_mark_ci95'))}".strip()
    return Cell(user, fixed(entry["mean"]), interval(entry["ci95"]), entry["n"], told, best, real, alarm, extra)


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def best_user(card: Card, level: str, name: str) -> str | None:
    """The simulated user whose paired differences to all of its rivals exclude 0 in its favour.

    It has values for as many people as a rival must have: two lucky conversations are no best.
    """
    found = {user: row["differences"].get(level, {}).get(name, []) for user, row in card["users"].items()}
    people: dict[str, int] = {user: card["users"][user][level][name]["n"] for user, own in found.items() if own}  # type: ignore[literal-required]
    enough = [user for user, n in people.items() if n >= COVERED * max(people.values())]
    ahead = (user for user in enough if all(verdict(METRICS[name], one) == "better" for one in found[user]))
    return next(ahead, None)


def verdict(metric: Metric, found: Difference) -> str:
    """`better` or `worse` where the interval of the difference lies on one side of 0; else empty.

    Example:
        >>> sure = {"against": "x", "difference": -2.0, "ci95": [-3.0, -1.0], "ratio": None, "n": 9}
        >>> verdict(METRICS["esr"], sure), verdict(METRICS["sem_sim"], sure)
        ('better', 'worse')
    """
    ends = found["ci95"]
    if not ends or metric.higher_is_better is None or ends[0] <= 0 <= ends[1]:
        return ""
    return "better" if (ends[0] > 0) == metric.higher_is_better else "worse"


def gaps(card: Card, level: str) -> list[Gap]:
    """Every difference at a level, metric by metric, a user's hardest rival first."""
    return [
        _gap(name, user, found, hardest=not rank)
        for name in METRICS
        for user, row in card["users"].items()
        for rank, found in enumerate(row["differences"].get(level, {}).get(name, []))
    ]


def _gap(name: str, user: str, found: Difference, hardest: bool) -> Gap:
    metric, twin = METRICS[name], found.get("twin")
    told = "" if twin is None else f"{fixed(twin['difference'], sign='+')} {interval(twin['ci95'], sign='+')}".strip()
    return Gap(
        metric.heading,
        user,
        found["against"],
        fixed(found["difference"], sign="+"),
        interval(found["ci95"], sign="+"),
        told,
        fixed(found["ratio"]),
        fixed(found["minimum_detectable_effect"]),
        found["n"],
        verdict(metric, found),
        hardest and name in HEADLINE,
    )


def invalid(card: Card) -> list[tuple[str, str, dict[str, int]]]:
    """User, level, and outcome to how many, of the simulated users."""
    return [
        (user, level, counts)
        for user, row in card["users"].items()
        if user not in (REAL, NEIGHBOUR)
        for level, counts in row["invalid"].items()
    ]


def costs(users: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> list[tuple[str, ...]]:
    """User, level, speaker, replies, tokens read and written, seconds, dollars; as text."""
    return [
        (
            user,
            level,
            role,
            *(f"{account.get(key) or 0:,}" for key in ("replies", "prompt_tokens", "completion_tokens")),
            f"{account['seconds']:.1f}",
            "–" if account.get("usd") is None else f"{account['usd']:.4f}",
        )
        for user, parts in users.items()
        for level, accounts in parts.items()
        for role, account in accounts.items()
    ]
