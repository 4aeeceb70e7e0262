"""The curves of a quality card: ADV by percentile, drift by turn, turn counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from usp_env.evaluation.card import LEVELS, Card, Entry, Level
from usp_env.report.facts import fixed
from usp_env.report.plots import Chart, Point, Series, chart

FEW = 0.5
"""A turn that less than this share of the conversations reached is drawn hollow."""


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


def _detail(row: Mapping[str, Entry], name: str) -> dict[str, Any]:
    return row[name].get("detail", {}) if name in row else {}
