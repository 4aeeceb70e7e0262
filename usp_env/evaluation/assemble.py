"""What users gave, as entries and differences of the card: means over people, intervals, minimum detectable effects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from usp_env.errors import SpecError
from usp_env.evaluation.card import METRICS, Difference, Entry, Metric, not_measured
from usp_env.evaluation.columns import Column, FloatArray, Mask, Measured, Measurement, Missing, Whole
from usp_env.evaluation.resampling import Rows, people_interval, resample
from usp_env.metrics import statistics
from usp_env.metrics.consistency import harmonic_mean
from usp_env.metrics.diversity import wasserstein
from usp_env.metrics.statistics import Interval, percentile_interval, person_means

DIGITS = 4
COVERED = 0.9
"""Share of a user's people that another must have values for, or it is no rival: two lucky conversations are no best."""


def entries(found: Measurement) -> dict[str, Entry]:
    """All metrics of a user at a level, in the card's order."""
    return {name: entry(METRICS[name], found.metrics[name], found) for name in METRICS if name in found.metrics}


def entry(metric: Metric, measured: Measured, found: Measurement) -> Entry:
    """One metric; not measured where no dialogue has a value.

    Args:
        metric: What it is.
        measured: What was found.
        found: Whose rows these are, and what was invalid.
    """
    if isinstance(measured, Missing):
        return not_measured(measured.reason)
    interval = _interval(measured, found.people)
    if not interval.n or math.isnan(interval.value):
        lost = ", ".join(f"{outcome} {n}" for outcome, n in found.invalid.items())
        return not_measured("no dialogue has a value" + (f"; invalid: {lost}" if lost else ""))
    out: Entry = {
        "mean": _scaled(interval.value, metric),
        "ci95": _bounds(interval, metric),
        "n": interval.n,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "scorer": measured.scorer,
    }
    if measured.note:
        out["note"] = measured.note
    if measured.detail:
        out["detail"] = dict(measured.detail)
    if isinstance(measured, Column) and measured.twin is not None:
        out["twin"] = entry(metric, measured.twin, found)
    return out


def _interval(measured: Column | Whole, people: Sequence[str]) -> Interval:
    if isinstance(measured, Whole):
        return Interval(measured.value, measured.low, measured.high, measured.n)
    if measured.of in ("mean", "pairs"):
        return statistics.mean_interval(_averaged(measured), people)
    if measured.of == "ratio":
        return statistics.ratio_interval(measured.parts[0], measured.parts[1], people)
    rows = np.flatnonzero(~np.isnan(measured.values))
    of = _statistic(measured, people, rows)
    return people_interval([people[i] for i in rows], lambda drawn: of(rows[drawn]))


def _statistic(column: Column, people: Sequence[str], counted: Rows) -> Callable[[Rows], float]:
    """The card's number of a harmonic mean, a distance or a ratio, from some of the rows that are counted."""
    first, second = column.parts
    if column.of == "harmonic":
        counts = Counter(people[i] for i in counted)
        weights = np.array([1 / max(counts[who], 1) for who in people])  # people weigh the same, however many rows they have

        def harmonic(rows: Rows) -> float:
            p, r = (np.average(part[rows], weights=weights[rows]) for part in (first, second))
            return float(harmonic_mean(p, r))

        return harmonic

    if column.of == "distance":
        return lambda rows: wasserstein(first[rows], second[rows])

    def ratio(rows: Rows) -> float:
        below = float(np.nansum(second[rows]))
        return float(np.nansum(first[rows])) / below if below else math.nan

    return ratio


# ── differences ──────────────────────────────────────────────────────────────────────────────────


def differences(users: Mapping[str, Measurement]) -> dict[str, dict[str, list[Difference]]]:
    """Each user against all others that have values for its people (`COVERED`), by metric, the hardest rival first.

    Metrics without a direction are left out.

    Args:
        users: Simulated users' measurements at one level.
    """
    out: dict[str, dict[str, list[Difference]]] = {user: {} for user in users}
    for name, metric in METRICS.items():
        for user in users if metric.higher_is_better is not None else ():
            pairs = {other: _compared(users[user], users[other]) for other in users if other != user}
            found = [difference(metric, name, *pair, other) for other, pair in pairs.items() if _is_rival(name, *pair)]
            if found:
                out[user][name] = sorted(found, key=lambda one: _lead(metric, one))
    return out


def _compared(user: Measurement, other: Measurement) -> tuple[Measurement, Measurement]:
    """Both over turns of their own: where one was given its first turn, the other without its first, too."""
    if (user.later is None) == (other.later is None):
        return user, other
    return user.later or user, other.later or other


def _is_rival(name: str, user: Measurement, other: Measurement) -> bool:
    own = _people_of(user, name)
    return bool(own) and len(own & _people_of(other, name)) >= COVERED * len(own)


def _lead(metric: Metric, found: Difference) -> float:
    """How far the user is ahead."""
    ahead = math.inf if found["difference"] is None else found["difference"]
    return ahead if metric.higher_is_better or math.isinf(ahead) else -ahead


def _people_of(user: Measurement, name: str) -> set[str]:
    """Whom a metric has a value for."""
    column = user.metrics.get(name)
    if not isinstance(column, Column):
        return set()
    known = ~np.isnan(column.parts or (column.values,)).any(axis=0)  # a ratio counts a person without a share of their own
    return {user.people[i] for i in np.flatnonzero(known)}


def difference(metric: Metric, name: str, user: Measurement, other: Measurement, against: str) -> Difference:
    """A user against another in one metric, on the people whom both have a value for, and on the turns that both said."""
    a, b = user.metrics[name], other.metrics[name]
    if not isinstance(a, Column) or not isinstance(b, Column):
        raise SpecError(f"{name}: expected a value for each dialogue of both users, got {a!r:.80} and {b!r:.80}")
    both = None if user.compared is None or other.compared is None else user.compared & other.compared
    found = _difference(metric, _among(a, both), user.people, _among(b, both), other.people, against)
    if a.twin is not None and b.twin is not None:
        found["twin"] = _difference(metric, _among(a.twin, both), user.people, _among(b.twin, both), other.people, against)
    return found


def _among(column: Column, turns: Mask | None) -> Column:
    return column if turns is None or column.among is None else replace(column, values=column.among(turns))


def _difference(
    metric: Metric, a: Column, people_a: Sequence[str], b: Column, people_b: Sequence[str], against: str
) -> Difference:
    of_what = _of_means if a.of in ("mean", "pairs") else _of_statistics
    interval, effect, mean_a, mean_b = of_what(a, people_a, b, people_b)
    return {
        "against": against,
        "difference": _scaled(interval.value, metric),
        "ci95": _bounds(interval, metric),
        "ratio": _number(mean_a / mean_b)
        if mean_a >= 0 and mean_b > 0
        else None,  # a margin says nothing where cosines are below 0
        "n": interval.n,
        "minimum_detectable_effect": _scaled(effect, metric),
    }


Found = tuple[Interval, float, float, float]
"""A difference, the smallest one to be detected, and what it is the difference of."""


def _of_means(a: Column, people_a: Sequence[str], b: Column, people_b: Sequence[str]) -> Found:
    pair = (_averaged(a), people_a, _averaged(b), people_b)
    own, other = person_means(*pair[:2]), person_means(*pair[2:])
    both = [who for who in own if who in other]
    mean_a, mean_b = (float(np.mean([means[who] for who in both])) if both else math.nan for means in (own, other))
    return statistics.paired_difference(*pair), statistics.minimum_detectable_effect(*pair), mean_a, mean_b


def _of_statistics(a: Column, people_a: Sequence[str], b: Column, people_b: Sequence[str]) -> Found:
    rows = np.flatnonzero(~(np.isnan(a.parts).any(axis=0) | np.isnan(b.parts).any(axis=0)))
    if not len(rows):
        return Interval(math.nan, math.nan, math.nan, 0), math.nan, math.nan, math.nan
    of_a, of_b = _statistic(a, people_a, rows), _statistic(b, people_b, rows)
    people = [people_a[i] for i in rows]
    draws = resample(people, lambda drawn: of_a(rows[drawn]) - of_b(rows[drawn]))
    draws = draws[~np.isnan(draws)]
    interval = percentile_interval(of_a(rows) - of_b(rows), [draws], len(set(people)))
    error = float(draws.std(ddof=1)) if len(draws) > 1 else math.nan
    return interval, statistics.detectable(error), of_a(rows), of_b(rows)


def _averaged(column: Column) -> FloatArray:
    """What the card's number is the mean of, over people."""
    return column.parts[0] if column.of == "pairs" else column.values


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def scores(user: str, level: str, found: Measurement) -> list[dict[str, Any]]:
    """Every row's own values, for `scores.jsonl`: where to look for the worst dialogues."""
    facts = found.rows or [{}] * len(found.people)
    columns: dict[str, tuple[Metric, Column]] = {}
    for name, measured in found.metrics.items():
        if isinstance(measured, Column):
            columns[name] = (METRICS[name], measured)
            if measured.twin is not None:
                columns[f"{name}.twin"] = (METRICS[name], measured.twin)
    return [
        {"user": user, "level": level, "person": person, **facts[k]}
        | {name: _scaled(float(column.values[k]), metric) for name, (metric, column) in columns.items()}
        for k, person in enumerate(found.people)
    ]


def _scaled(value: float, metric: Metric) -> float | None:
    return _number(value * metric.scale)


def _number(value: float) -> float | None:
    """For JSON, rounded: what shares a text's batch moves its scores by 1e-7."""
    return None if math.isnan(value) else round(float(value), DIGITS) + 0.0


def _bounds(interval: Interval, metric: Metric) -> list[float] | None:
    low, high = _scaled(interval.low, metric), _scaled(interval.high, metric)
    return None if low is None or high is None else [low, high]
