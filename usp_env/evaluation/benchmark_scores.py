"""From the scores of episodes to a leaderboard's numbers; pure.

Intervals within a population come from `usp_env.metrics.statistics`, those across populations from
`usp_env.evaluation.benchmark_bootstrap`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from usp_env.errors import SpecError
from usp_env.evaluation.benchmark_bootstrap import EpisodeScore, Resampled, Table
from usp_env.evaluation.leaderboard import MOST_INVALID, Estimate, Pair, Reference, Row
from usp_env.metrics.agreement import elo_ratings
from usp_env.metrics.statistics import Interval, mean_interval, paired_difference, percentile_interval

ELO_REPLICATES = 200
TIE = 1e-9
"""Scores that are no further apart are a tie."""

Wins = Mapping[tuple[str, str, str], float]
"""(assistant, assistant, episode) to what a judge found between the two: 1, 0.5 or 0 for the first, NaN for nothing."""


@dataclass(frozen=True, slots=True)
class Results:
    """The numbers of a leaderboard."""

    rows: list[Row]
    pairs: list[Pair]
    reference: Reference | None


def results(
    scores: Sequence[EpisodeScore],
    specs: Mapping[str, str],
    turns: int,
    wins: Wins | None = None,
    ranking: tuple[str, Mapping[str, Any]] | None = None,
) -> Results:
    """Rows (best first), pairs and the agreement with a reference.

    Args:
        scores: The same episodes of every assistant.
        specs: Assistant's name to its resolved spec.
        turns: Length of the curves.
        wins: What a judge found between pairs; None compares scores.
        ranking: A reference's name, and its scores by assistant.

    Raises:
        SpecError: Assistants did not have the same episodes, or a reference's score is no number.
    """
    table = Table.of(scores, list(specs))
    drawn = Resampled(table)
    placed = rows(table, specs, turns, drawn, wins)
    told = None if ranking is None else against(ranking[1], ranking[0], table, specs, drawn)
    return Results(placed, pairs(table, [row.assistant for row in placed], drawn, wins), told)


def with_twin(found: Results, scores: Sequence[EpisodeScore]) -> Results:
    """The same with averages by a held-out scorer.

    Args:
        found: By the scorer that ranks.
        scores: The same episodes by the other.
    """
    table = Table.of(scores, [row.assistant for row in found.rows])
    drawn, place = Resampled(table), {name: i for i, name in enumerate(table.assistants)}
    reason = "a population has no episode that the twin can score"
    rows = [replace(row, twin=Estimate.of(drawn.average(place[row.assistant]), reason)) for row in found.rows]
    columns = [drawn.column(place[pair.first], place[pair.second]) for pair in found.pairs]  # the better is always first
    pairs = [replace(p, twin=Estimate.of(drawn.average(c), reason)) for p, c in zip(found.pairs, columns, strict=True)]
    return Results(rows, pairs, found.reference)


def rows(table: Table, specs: Mapping[str, str], turns: int, drawn: Resampled, wins: Wins | None = None) -> list[Row]:
    """The leaderboard's rows, best first."""
    ratings = _ratings(table, wins)
    found = [_row(table, a, specs, turns, drawn, ratings[name]) for a, name in enumerate(table.assistants)]
    order = sorted(found, key=lambda row: -math.inf if row.average.mean is None else row.average.mean, reverse=True)
    placed, rank = [], 0
    for i, row in enumerate(order, 1):
        if i == 1 or row.average.mean != order[i - 2].average.mean:
            rank = i
        placed.append(replace(row, rank=None if row.average.mean is None else rank))
    return placed


def _row(table: Table, a: int, specs: Mapping[str, str], turns: int, drawn: Resampled, rating: Estimate) -> Row:
    name = table.assistants[a]
    own = table.rows[name]
    invalid = Counter(score.outcome for score in own if math.isnan(score.value))
    by_population = {p: [score for score in own if score.population == p] for p in table.people}
    return Row(
        rank=None,
        assistant=name,
        spec=specs[name],
        average=Estimate.of(drawn.average(a), "a population has no valid episode"),
        populations={p: Estimate.of(_mean(scores)) for p, scores in by_population.items()},
        gaps={f"{p}-{q}": Estimate.of(drawn.gap(a, p, q)) for p, q in _gaps(list(table.people))},
        curves={p: curve(scores, turns) for p, scores in by_population.items()},
        elo=rating,
        episodes=len(own),
        invalid=dict(sorted(invalid.items())),
        marked=sum(invalid.values()) > MOST_INVALID * len(own),
        endings=dict(sorted(Counter(score.end_reason for score in own).items())),
    )


def _mean(scores: Sequence[EpisodeScore]) -> Interval:
    return mean_interval([score.value for score in scores], [score.profile_id for score in scores])


def _gaps(populations: Sequence[str]) -> list[tuple[str, str]]:
    """Each population against the ones before it; `majority` is always what is taken away."""
    order = sorted(populations, key=lambda name: (name != "majority", populations.index(name)))
    return [(second, first) for first, second in combinations(order, 2)]


def curve(scores: Sequence[EpisodeScore], turns: int) -> list[Estimate]:
    """Mean score after each of `turns` turns, over everybody; a conversation that has ended keeps its last score.

    Example:
        >>> scores = [EpisodeScore("a", "all", p, p, c[-1], "completed", "", c) for p, c in (("x", (0.2,)), ("y", (0.0, 0.4)))]
        >>> [round(point.mean, 1) for point in curve(scores, 3)]
        [0.1, 0.3, 0.3]
    """
    known = [score for score in scores if not math.isnan(score.value) and score.curve]
    people = [score.profile_id for score in known]
    return [
        Estimate.of(mean_interval([s.curve[min(t, len(s.curve) - 1)] for s in known], people), "no curve of a valid episode")
        for t in range(turns)
    ]


def pairs(table: Table, order: Sequence[str], drawn: Resampled, wins: Wins | None = None) -> list[Pair]:
    """Every two assistants, in the order given."""
    return [_pair(table, first, second, drawn, wins) for first, second in combinations(order, 2)]


def _pair(table: Table, first: str, second: str, drawn: Resampled, wins: Wins | None) -> Pair:
    found = {}
    for population in table.people:
        sides = [[s for s in table.rows[name] if s.population == population] for name in (first, second)]
        other = {s.episode: s for s in sides[1]}
        both = [(s, other[s.episode]) for s in sides[0] if not math.isnan(s.value + other[s.episode].value)]
        ids = [s.profile_id for s, _ in both]
        found[population] = Estimate.of(paired_difference([s.value for s, _ in both], ids, [o.value for _, o in both], ids))
    outcomes = [outcome for _, _, outcome in games(table, first, second, wins)]
    a, b = table.assistants.index(first), table.assistants.index(second)
    average = drawn.average(drawn.column(min(a, b), max(a, b)))
    if a > b:
        average = Interval(-average.value, -average.high, -average.low, average.n)
    return Pair(
        first,
        second,
        Estimate.of(average, "a population has no episode that is valid for both"),
        found,
        sum(outcome > 0.5 for outcome in outcomes),
        sum(outcome == 0.5 for outcome in outcomes),
        sum(outcome < 0.5 for outcome in outcomes),
    )


def games(table: Table, first: str, second: str, wins: Wins | None = None) -> list[tuple[str, str, float]]:
    """(population, profile id, outcome for the first) of the episodes that are valid for both."""
    other = {score.episode: score for score in table.rows[second]}
    found = []
    for score in table.rows[first]:
        difference = score.value - other[score.episode].value
        if wins is None:
            outcome = math.nan if math.isnan(difference) else 0.5 if abs(difference) <= TIE else float(difference > 0)
        elif (told := wins.get((first, second, score.episode))) is not None:
            outcome = told
        else:
            outcome = 1 - wins.get((second, first, score.episode), math.nan)
        if not math.isnan(outcome):
            found.append((score.population, score.profile_id, outcome))
    return found


def _ratings(table: Table, wins: Wins | None, replicates: int = ELO_REPLICATES, seed: int = 0) -> dict[str, Estimate]:
    """Elo of each assistant that shares a valid episode with another, its interval over people."""
    index = {name: i for i, name in enumerate(table.assistants)}
    by_person = {p: {person: np.zeros((len(index), len(index))) for person in own} for p, own in table.people.items()}
    for first, second in combinations(table.assistants, 2):
        for population, person, outcome in games(table, first, second, wins):
            by_person[population][person][index[first], index[second]] += outcome
            by_person[population][person][index[second], index[first]] += 1 - outcome
    counts = [np.stack(list(own.values())) for own in by_person.values()]  # (people, k, k) of each population
    total = np.sum([own.sum(axis=0) for own in counts], axis=0)
    played = np.flatnonzero((total + total.T).any(axis=1))
    rng = np.random.default_rng(seed)
    value, draws = np.full(len(index), math.nan), np.full((replicates, len(index)), math.nan)
    if len(played):
        value[played] = elo_ratings(total[np.ix_(played, played)])
        for row in draws:
            drawn = np.sum([own[rng.integers(len(own), size=len(own))].sum(axis=0) for own in counts], axis=0)
            row[played] = elo_ratings(drawn[np.ix_(played, played)])
    n = sum(map(len, by_person.values()))
    reason = "it shares no valid episode with another assistant"
    return {name: Estimate.of(percentile_interval(float(value[i]), [draws[:, i]], n), reason) for name, i in index.items()}


def against(reference: Mapping[str, Any], source: str, table: Table, specs: Mapping[str, str], drawn: Resampled) -> Reference:
    """Rank correlation to a reference's scores (more is better), whose names are the assistants' as given or as resolved.

    Raises:
        SpecError: The reference is no object of names and numbers.
    """
    for name, value in reference.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise SpecError(f"{source}: expected a JSON object of names and scores, got {name!r}: {value!r:.80}")
    scores = {name: reference.get(name, reference.get(specs[name])) for name in table.assistants}
    known = [name for name in table.assistants if scores[name] is not None]
    columns = [table.assistants.index(name) for name in known]
    columns = [column for column in columns if not math.isnan(drawn.average(column).value)]
    ranked = [table.assistants[column] for column in columns]
    reason = "fewer than 2 assistants with different scores are in the reference"
    found = drawn.rank_correlation(columns, [float(scores[name] or 0.0) for name in ranked]) if len(ranked) > 1 else None
    told = Estimate(None, None, 0, reason) if found is None else Estimate.of(found, reason)
    return Reference(source, told, ranked, [name for name in table.assistants if name not in ranked])
