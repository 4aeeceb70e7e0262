"""The plots of a quality card: ADV by percentile, drift by turn, turn counts, the detector's calibration, the map of people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from usp_env.evaluation.card import LEVELS, Card, Entry, Level
from usp_env.report.facts import fixed, interval
from usp_env.report.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Box, Chart, Limits, Point, Series, chart, style

FEW = 0.5
"""A turn that less than this share of the conversations reached is drawn hollow."""
FEW_TEXTS = 5
"""A bin of less is drawn hollow."""


def adv_chart(card: Card, styles: Mapping[str, str]) -> Chart | None:
    """Distance to the real conversations, percentile by percentile."""
    series = []
    for user, row in card["users"].items():
        detail = _detail(row["conversation"], "adv")
        pairs = zip(detail.get("percentiles", ()), detail.get("curve", ()), strict=False)
        points = [Point(x, y, f"{user}, {x}th percentile: {fixed(y)}") for x, y in pairs]
        series.append(Series(user, styles[user], points))
    labels = "percentile of the conversations", "distance, plane units"
    return chart("ADV by percentile", series, labels, x_limits=(0, 100), note="Lower is closer to the real conversations.")


def drift_charts(card: Card, styles: Mapping[str, str]) -> list[Chart | None]:
    """How well each turn keeps to the profile, at each level."""
    return [_drift_chart(card, level, styles) for level in reversed(LEVELS)]


def _drift_chart(card: Card, level: Level, styles: Mapping[str, str]) -> Chart | None:
    series = []
    for user, row in card["users"].items():
        detail = _detail(row[level], "drift")
        counts = detail.get("dialogues", ())
        points = [
            Point(turn, y, f"{user}, turn {turn}: {fixed(y)} ({n} conversations)", weak=n < FEW * max(counts))
            for turn, (y, n) in enumerate(zip(detail.get("turns", ()), counts, strict=False), 1)
        ]
        series.append(Series(user, styles[user], points))
    note = "By the first scorer. Hollow: less than half of the conversations came that far."
    return chart(f"Drift from the profile, {level} level", series, ("user turn", "r-DP.P, %"), y_limits=(0, 100), note=note)


def turn_chart(scores: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> Chart | None:
    """How many turns the conversations have."""
    counts: dict[str, Counter[int]] = {user: Counter() for user in styles}
    for row in scores:
        turns = row.get("user_turns")
        if row["level"] == "conversation" and turns is not None and row["user"] in counts:
            counts[row["user"]][int(turns)] += 1
    last = max((turns for own in counts.values() for turns in own), default=1)
    series = []
    for user, own in counts.items():
        share = {turns: 100 * own[turns] / own.total() for turns in range(min(1, *own), last + 1)} if own else {}
        points = [Point(turns, y, f"{user}, {turns} user turns: {y:.0f} % of {own.total()}") for turns, y in share.items()]
        series.append(Series(user, styles[user], points))
    return chart("Turn counts", series, ("user turns of a conversation", "% of conversations"), note="Valid conversations.")


def calibration_chart(card: Card, styles: Mapping[str, str]) -> Chart | None:
    """Whether the human-likeness detector's probabilities come true: on the diagonal they do."""
    found = card.get("calibration", [])
    names = {own["scorer"]: style(len(styles) + k) for k, own in enumerate(found)}
    series = [
        Series(
            own["scorer"],
            names[own["scorer"]],
            [
                Point(
                    one["predicted"],
                    one["share"],
                    f"{own['scorer']}, P {one['low']:g} to {one['high']:g} %: mean {fixed(one['predicted'])}, people's "
                    f"{fixed(one['share'])} {interval(one['ci95'])}, {one['n']} texts",
                    low=one["ci95"][0],
                    high=one["ci95"][1],
                    weak=one["n"] < FEW_TEXTS,
                )
                for one in own["bins"]
            ],
            bars=True,
        )
        for own in found
    ]
    if not series:
        return None
    ideal = Series("as predicted", "ideal", [Point(0, 0, ""), Point(100, 100, "")])
    errors = ", ".join(f"{own['scorer']} {fixed(own['ece'])} %" for own in found)
    note = (
        f"Calibration error (ECE): {errors}. {found[0]['n']} texts of {found[0]['people']} real conversations: user turns, and "
        f"as many beginnings of replies as long. Bars: 95 % intervals, by conversation. Hollow: fewer than {FEW_TEXTS} texts."
    )
    return chart(
        "Calibration of the human-likeness detector",
        [ideal, *series],
        ("P(human), mean of the bin, %", "written by people, %"),
        x_limits=(0, 100),
        y_limits=(0, 100),
        note=note,
        key=list(names.items()),
    )


def map_chart(card: Card) -> Chart | None:
    """Where the evaluated people live among the people of their split."""
    if (found := card.get("map")) is None:
        return None
    x, y = _same_scale(found["x"], found["y"])
    points = [Point(across, up, f"person {id}") for id, (across, up) in found["people"].items()]
    *most, last = reversed(found["held"])
    note = (
        f"Dots: the {len(points)} evaluated people. Shades, from the inmost: where the densest {', '.join(map(str, most))} and "
        f"{last} % of the {found['profiles']} people of {card['split']} live."
    )
    shades = [_boxes(found["shades"], found["x"], found["y"], level) for level in range(1, len(found["held"]) + 1)]
    labels = (f"{found['layout'].upper()} 1", f"{found['layout'].upper()} 2")
    series = [Series("evaluated people", "real", points, line=False)]
    return chart("Evaluated people on the density map", series, labels, x_limits=x, y_limits=y, note=note, shades=shades)


def _same_scale(x: Sequence[float], y: Sequence[float]) -> tuple[Limits, Limits]:
    """Limits about the same centres within which a unit is as long across as up."""
    room = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    unit = max((x[1] - x[0]) / room[0], (y[1] - y[0]) / room[1])
    ends = [((low + high - unit * r) / 2, (low + high + unit * r) / 2) for (low, high), r in zip((x, y), room, strict=True)]
    return ends[0], ends[1]


def _boxes(rows: Sequence[str], x: Sequence[float], y: Sequence[float], level: int) -> list[Box]:
    """The cells of at least a level, those beside one another in one box."""
    wide, high = (x[1] - x[0]) / len(rows[0]), (y[1] - y[0]) / len(rows)
    boxes: list[Box] = []
    for k, row in enumerate(rows):
        top, first = y[1] - k * high, 0
        for inside, cells in groupby(row, lambda cell: int(cell) >= level):
            last = first + len(list(cells))
            if inside:
                boxes.append((x[0] + first * wide, top - high, x[0] + last * wide, top))
            first = last
    return boxes


def _detail(row: Mapping[str, Entry], name: str) -> dict[str, Any]:
    return row[name].get("detail", {}) if name in row else {}
