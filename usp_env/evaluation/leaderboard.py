"""The leaderboard of a benchmark: its records, as `leaderboard.json` holds them, and the same as Markdown.

    Leaderboard ─ rows: one per assistant, best first ─ populations, average, gaps, curves: `Estimate`s
                ├ pairs: every two assistants on the same episodes, with the difference's interval
                └ protocol, modified, settings, profiles, score, reference, judge

How the numbers come about: `usp_env.evaluation.benchmark_scores`. An invalid episode (the user or an engine failed) is counted
and left out of every mean; a row with more than 2 % of them is marked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from usp_env.metrics.statistics import Interval

BOARD = "leaderboard.json"
MOST_INVALID = 0.02
"""Share of invalid episodes above which a row is marked."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval.

    Args:
        mean: None where nothing was measured.
        ci95: None where there is no telling, e.g. of one person.
        n: People behind it.
        reason: Why a number is missing.
    """

    mean: float | None
    ci95: tuple[float, float] | None
    n: int
    reason: str | None = None

    @classmethod
    def of(cls, interval: Interval, reason: str = "no valid episode") -> Estimate:
        """An interval of `usp_env.metrics.statistics`; `reason` stands where it has no value."""
        if math.isnan(interval.value):
            return cls(None, None, interval.n, reason)
        if math.isnan(interval.low):
            return cls(interval.value, None, interval.n, "fewer than 2 people")
        return cls(interval.value, (interval.low, interval.high), interval.n)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.ci95 is not None and (self.ci95[0] > 0 or self.ci95[1] < 0)


@dataclass(frozen=True, slots=True)
class Score:
    """What the numbers are.

    Args:
        name: `goal`, or `judge`.
        scorer: What gave them.
        unit: For people: `%`, `x 100` (of a return that is no share), or `1-10`.
        higher_is_better: Always true today.
    """

    name: str
    scorer: str
    unit: str
    higher_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One assistant.

    Args:
        rank: From 1, by the average; None without one.
        assistant: As it was named.
        spec: As it was resolved.
        average: Mean of the populations' means.
        populations: Population to mean score.
        gaps: Such as `minority-majority`: the first's mean less the second's.
        curves: Population to the mean score after each user turn, of everybody: who has left keeps their last.
        elo: From pairwise outcomes on the same episodes; the mean of all assistants is 1,000.
        episodes: That were played.
        invalid: Outcome to number of episodes that count in no mean.
        marked: More than 2 % of the episodes are invalid.
        endings: End reason to number of episodes.
        weights: Digest of its weights; None where there are none, or nobody tells.
        twin: The average by the held-out scorer; None without one.
    """

    rank: int | None
    assistant: str
    spec: str
    average: Estimate
    populations: Mapping[str, Estimate]
    gaps: Mapping[str, Estimate]
    curves: Mapping[str, Sequence[Estimate]]
    elo: Estimate
    episodes: int
    invalid: Mapping[str, int]
    marked: bool
    endings: Mapping[str, int]
    weights: str | None = None
    twin: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two assistants on the same episodes.

    Args:
        first: One.
        second: The other.
        average: Mean of the populations' differences, first less second.
        populations: Population to mean difference, first less second.
        wins: Episodes in which the first does better; likewise the next two.
        ties: Neither.
        losses: The second does.
        twin: The average by the held-out scorer; None without one.
    """

    first: str
    second: str
    average: Estimate
    populations: Mapping[str, Estimate]
    wins: int
    ties: int
    losses: int
    twin: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """Agreement with a reference ranking.

    Args:
        source: The file.
        spearman: Between averages and the reference's scores; the interval is over people, its `n` are people.
        assistants: Those that both rank.
        missing: Assistants that the reference lacks.
    """

    source: str
    spearman: Estimate
    assistants: Sequence[str]
    missing: Sequence[str]


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Everything that a benchmark says; `leaderboard.json`.

    Args:
        protocol: `usp-bench-1`, with `+modified` where the run departs from it.
        modified: How, one line each.
        settings: The protocol as it was run, with the digests that its names stood for.
        profiles: Population to the ids that were played, in order.
        caps: Population to why it has fewer than `n` profiles, where it has.
        score: What the numbers are.
        curve_score: What the curves' numbers are.
        twin: What the numbers of the held-out scorer are: no model is trained by it, so that claims are judged by it; None
            where the reward has no twin.
        rows: Best first.
        pairs: Every two assistants, the better first.
        reference: None without one.
        judge: How the judge passed the gate; None offline.
        versions: Of the packages.
    """

    protocol: str
    modified: Sequence[str]
    settings: Mapping[str, Any]
    profiles: Mapping[str, Sequence[str]]
    caps: Mapping[str, str]
    score: Score
    curve_score: Score
    rows: Sequence[Row]
    pairs: Sequence[Pair]
    reference: Reference | None = None
    judge: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    twin: Score | None = None

    def row(self, assistant: str) -> Row:
        """The row of an assistant, by the name it was given."""
        return next(row for row in self.rows if row.assistant == assistant)

    def difference(self, first: str, second: str, population: str | None = None) -> Estimate:
        """Mean of the first less mean of the second; in a population, or on average."""
        for pair in self.pairs:
            if {pair.first, pair.second} == {first, second}:
                found = pair.average if population is None else pair.populations[population]
                return found if pair.first == first else turned(found)
        raise KeyError((first, second))

    def to_json(self) -> str:
        """The file's text; the same run gives the same bytes."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1, allow_nan=False) + "\n"

    def markdown(self) -> str:
        """Tables for people."""
        return "\n\n".join(part for part in (_head(self), _table(self), _curves(self), _pairs(self), _foot(self)) if part) + "\n"


def turned(estimate: Estimate) -> Estimate:
    """A difference the other way round."""
    mean = None if estimate.mean is None else -estimate.mean
    return Estimate(mean, estimate.ci95 and (-estimate.ci95[1], -estimate.ci95[0]), estimate.n, estimate.reason)


def _head(board: Leaderboard) -> str:
    lines = [f"# {board.protocol}", ""]
    if board.modified:
        lines += ["Modified, so that its numbers compare with no other run's:", ""]
        lines += [f"- {_safe(change)}" for change in board.modified] + [""]
    settings = board.settings
    people = ", ".join(f"{name} {len(ids)}" for name, ids in board.profiles.items())
    lines.append(
        f"User `{settings['user']}`, up to {settings['turns']} turns; bank `{settings['bank']}`, split {settings['split']}; "
        f"profiles: {people} (of {settings['n']} asked for each), {len(settings['seeds'])} episode(s) each."
    )
    lines += [f"{name}: {why}." for name, why in board.caps.items()]
    score = board.score
    lines.append(f"Score: {score.name} by {_safe(score.scorer)} ({score.unit}, higher is better); 95 % intervals over people.")
    if board.twin is not None:
        lines.append(f"{_twin(board.twin)}: the average by {_safe(board.twin.scorer)}, which trains nothing: judge claims by it.")
    return "\n".join(lines)


def _twin(score: Score) -> str:
    """The heading of the held-out scorer's column."""
    return f"{_safe(score.name)}, twin ({score.unit})"


def _table(board: Leaderboard) -> str:
    populations = list(board.profiles)
    gaps = list(board.rows[0].gaps) if board.rows else []
    twin = [] if board.twin is None else [_twin(board.twin)]
    head = ["#", "assistant", *populations, "average", *twin, *gaps, "Elo", "invalid"]
    rows = [
        [
            "–" if row.rank is None else str(row.rank),
            _safe(row.assistant),
            *(_shown(row.populations[name]) for name in populations),
            _shown(row.average),
            *([_shown(row.twin)] if twin and row.twin else ["–"] * len(twin)),
            *(_shown(row.gaps[name], sign=True) for name in gaps),
            _shown(row.elo, digits=0),
            f"{sum(row.invalid.values())}/{row.episodes}" + (" ⚠" if row.marked else ""),
        ]
        for row in board.rows
    ]
    note = f"\n\n⚠ more than {MOST_INVALID:.0%} of the episodes are invalid." if any(row.marked for row in board.rows) else ""
    return grid(head, rows) + note


def _curves(board: Leaderboard) -> str:
    turns = range(1, int(board.settings["turns"]) + 1)
    rows = [
        [_safe(row.assistant), name, *(_number(point.mean) for point in row.curves[name])]
        for row in board.rows
        for name in board.profiles
        if row.curves[name]
    ]
    if not rows:
        return ""
    score = board.curve_score
    return f"## By turn\n\n{score.name} by {score.scorer} ({score.unit}).\n\n" + grid(
        ["assistant", "users", *map(str, turns)], rows
    )


def _pairs(board: Leaderboard) -> str:
    populations = list(board.profiles)
    twin = [] if board.twin is None else [_twin(board.twin)]
    rows = [
        [
            f"{_safe(pair.first)} − {_safe(pair.second)}",
            *(_shown(pair.populations[name], sign=True) for name in populations),
            _shown(pair.average, sign=True),
            *([_shown(pair.twin, sign=True)] if twin and pair.twin else ["–"] * len(twin)),
            f"{pair.wins}/{pair.ties}/{pair.losses}",
        ]
        for pair in board.pairs
    ]
    if not rows:
        return ""
    return "## Differences on the same episodes\n\n" + grid(["", *populations, "average", *twin, "win/tie/loss"], rows)


def _foot(board: Leaderboard) -> str:
    lines = []
    if board.reference is not None:
        told = _shown(board.reference.spearman, digits=2)
        lines.append(f"Spearman to {_safe(board.reference.source)}: {told}, {len(board.reference.assistants)} assistants.")
        if board.reference.missing:
            lines.append(f"Not in it: {', '.join(map(_safe, board.reference.missing))}.")
    if board.judge is not None:
        lines.append("Judge: " + ", ".join(f"{key} {value}" for key, value in board.judge.items()) + ".")
    return "\n".join(lines)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(grid(["user", "ESR"], [["a", "10.0"]]))
        | user | ESR |
        | --- | --- |
        | a | 10.0 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(estimate: Estimate, *, sign: bool = False, digits: int = 1) -> str:
    if estimate.mean is None:
        return "–"
    told = _number(estimate.mean, sign, digits)
    if estimate.ci95 is None:
        return told
    return f"{told} [{_number(estimate.ci95[0], sign, digits)}, {_number(estimate.ci95[1], sign, digits)}]"


def _number(value: float | None, sign: bool = False, digits: int = 1) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _safe(text: str) -> str:
    """A name inside a table: no cell or line ends in it."""
    return text.replace("|", "\\|").replace("\n", " ")
