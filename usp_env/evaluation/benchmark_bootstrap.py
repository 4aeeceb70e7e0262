"""Scores of episodes by place, and bootstrap replicates of their means that span populations; pure.

A person counts once, however many episodes (seeds) stand behind them. Resampling is two-level, people and, within them, episodes
(`usp_env.metrics.statistics`), in each population by itself, and the same for all assistants, so that differences are of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError
from usp_env.metrics.agreement import spearman
from usp_env.metrics.statistics import REPLICATES, Interval, percentile_interval

FloatArray = npt.NDArray[np.float64]
_BLOCK = 2_000_000  # resampled values held at a time


@dataclass(frozen=True, slots=True)
class EpisodeScore:
    """One episode of one assistant.

    Args:
        assistant: Its name.
        population: Of the user.
        profile_id: Of the user.
        episode: Id of the episode: the same for every assistant.
        value: The score; NaN where the episode is invalid.
        outcome: Why it counts, or does not.
        end_reason: Why it ended.
        curve: Score after each user turn that the assistant answered.
    """

    assistant: str
    population: str
    profile_id: str
    episode: str
    value: float
    outcome: str
    end_reason: str
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """Scores by place: `values[population]` is (assistants, people, seeds), NaN where there is none.

    Args:
        assistants: In the order of the command line.
        people: Population to profile ids.
        values: See above.
        episodes: Population to episode ids, (people, seeds).
        rows: Assistant to its episodes.
    """

    assistants: Sequence[str]
    people: Mapping[str, Sequence[str]]
    values: Mapping[str, FloatArray]
    episodes: Mapping[str, Sequence[Sequence[str]]]
    rows: Mapping[str, Sequence[EpisodeScore]]

    @classmethod
    def of(cls, scores: Sequence[EpisodeScore], assistants: Sequence[str]) -> Table:
        """Put scores into their places.

        Raises:
            SpecError: Assistants did not have the same episodes, so that nothing can be compared.
        """
        rows = {name: [score for score in scores if score.assistant == name] for name in assistants}
        first = {(s.population, s.profile_id, s.episode): i for i, s in enumerate(rows[assistants[0]])}
        for name in assistants:
            if {(s.population, s.profile_id, s.episode) for s in rows[name]} != set(first) or len(rows[name]) != len(first):
                raise SpecError(f"expected the same episodes of every assistant, {name!r} has others than {assistants[0]!r}")
        layout: dict[str, dict[str, list[str]]] = {}
        for population, person, episode in first:
            layout.setdefault(population, {}).setdefault(person, []).append(episode)
        found = {(s.assistant, s.episode): s.value for s in scores}
        values = {}
        for population, own in layout.items():
            table = np.full((len(assistants), len(own), max(map(len, own.values()))), np.nan)
            for a, name in enumerate(assistants):
                for p, ids in enumerate(own.values()):
                    table[a, p, : len(ids)] = [found[name, episode] for episode in ids]
            values[population] = table
        people = {population: list(own) for population, own in layout.items()}
        return cls(assistants, people, values, {p: list(own.values()) for p, own in layout.items()}, rows)


class Resampled:
    """Bootstrap replicates of the populations' means, people and episodes drawn alike for all assistants.

    Args:
        table: The scores.
        replicates: How many.
        seed: Of the resampling.

    Attributes:
        means: Population to the means of assistants, then of differences of pairs: (replicates, columns).
        value: Population to the same on the data as they are, (columns,).
        counts: Population to the people behind each column, (columns,).
        pairs: The pairs of indices that the columns after the assistants stand for.
    """

    def __init__(self, table: Table, replicates: int = REPLICATES, seed: int = 0) -> None:
        self.table, self.pairs = table, list(combinations(range(len(table.assistants)), 2))
        self.means: dict[str, FloatArray] = {}
        self.value: dict[str, FloatArray] = {}
        self.counts: dict[str, npt.NDArray[np.int64]] = {}
        for k, (population, values) in enumerate(table.values.items()):
            left, right = ([pair[side] for pair in self.pairs] for side in (0, 1))
            columns = np.concatenate([values, values[left] - values[right]])
            own = _nanmean(columns)
            self.value[population] = _nanmean(own)
            self.counts[population] = np.isfinite(own).sum(axis=1)
            self.means[population] = resample(columns, replicates, np.random.default_rng([seed, k]))

    def column(self, a: int, b: int | None = None) -> int:
        """Of an assistant, or of the difference of two, a before b."""
        return a if b is None else len(self.table.assistants) + self.pairs.index((a, b))

    def average(self, column: int) -> Interval:
        """Mean over populations; NaN where one of them has no value."""
        value = float(np.mean([self.value[p][column] for p in self.value]))
        draws = np.mean([self.means[p][:, column] for p in self.means], axis=0)
        return percentile_interval(value, [draws], self._people(column, list(self.means)))

    def gap(self, column: int, first: str, second: str) -> Interval:
        """First population's mean less the second's; their people are others, so they are resampled apart."""
        value = float(self.value[first][column] - self.value[second][column])
        draws = self.means[first][:, column] - self.means[second][:, column]
        return percentile_interval(value, [draws], self._people(column, [first, second]))

    def _people(self, column: int, populations: Sequence[str]) -> int:
        """People behind a column; fewer than 2 where a population has fewer, since one person tells nothing about others."""
        counts = [int(self.counts[p][column]) for p in populations]
        return sum(counts) if min(counts) > 1 else min(counts)

    def rank_correlation(self, columns: Sequence[int], reference: Sequence[float]) -> Interval:
        """Spearman between averages and a fixed reference."""
        value = np.mean([self.value[p][list(columns)] for p in self.value], axis=0)
        draws = np.mean([self.means[p][:, list(columns)] for p in self.means], axis=0)
        found = np.array([spearman(row, reference) if np.isfinite(row).all() else math.nan for row in draws])
        people = sum(len(own) for own in self.table.people.values())
        return percentile_interval(spearman(value, reference), [found], people)


def resample(columns: FloatArray, replicates: int, rng: np.random.Generator) -> FloatArray:
    """Two-level bootstrap means of columns over the same people and episodes.

    Args:
        columns: (columns, people, seeds); NaN is left out.
        replicates: B.
        rng: Of the draws.

    Returns:
        (B, columns); NaN where a replicate drew nobody who has a value.

    Example:
        >>> resample(np.array([[[1.0], [1.0]], [[2.0], [np.nan]]]), 3, np.random.default_rng(1)).shape
        (3, 2)
    """
    width, people, seeds = columns.shape
    out, block = np.empty((replicates, width)), max(1, _BLOCK // max(1, columns.size))
    for start in range(0, replicates, block):
        size = min(block, replicates - start)
        drawn = rng.integers(people, size=(size, people))
        if seeds == 1:
            rows = columns[:, drawn, 0]  # (columns, b, people)
        else:
            rows = _nanmean(columns[:, drawn[..., None], rng.integers(seeds, size=(size, people, seeds))])
        out[start : start + size] = _nanmean(rows).T
    return out


def _nanmean(values: FloatArray) -> FloatArray:
    """Mean over the last axis of what is there; NaN where nothing is, without a warning."""
    there = np.isfinite(values)
    count = there.sum(axis=-1)
    total = np.where(there, values, 0.0).sum(axis=-1)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))
