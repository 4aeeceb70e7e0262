"""What the card's page draws beside the metrics: whether the detector's probabilities come true, and where the people live."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from usp_env.evaluation.assemble import DIGITS
from usp_env.evaluation.card import Map, Reliability
from usp_env.evaluation.people import Person
from usp_env.evaluation.scorers import Scorer
from usp_env.metrics.reliability import Text, bins_of, ece, length_matched
from usp_env.rewards.human_likeness import TextScorer, probabilities
from usp_env.sampling.density import DensitySampler
from usp_env.sampling.diagnostics import density_grid
from usp_env.sampling.kde import FloatArray

CELLS = 128
"""Of the map in each direction, before its empty margins are cut off."""
ROOM = 4
"""Empty cells that stay around what is shown."""
HELD = (95, 75, 50, 25, 10)
"""Shades of the map, the outermost first: per cent of the bank's people who live where the density is at least so high."""


def calibration(people: Sequence[Person], human: Scorer[TextScorer]) -> list[Reliability]:
    """The human-likeness detector, and its twin, on what these people and their assistants really said.

    Args:
        people: Their whole conversations count, however many turns the users were asked for.
        human: The detector.

    Returns:
        Empty where no user turn finds a reply of its length in another conversation.
    """
    texts = length_matched({who.id: who.dialogue for who in people})
    return [_reliability(model, name, texts) for model, name in human.both()] if texts else []


def _reliability(model: TextScorer, name: str, texts: Sequence[Text]) -> Reliability:
    p = probabilities(model([one.text for one in texts]), len(texts), "human_likeness")
    y, clusters = np.array([one.human for one in texts]), [one.cluster for one in texts]
    return {
        "scorer": name,
        "n": len(texts),
        "people": len(set(clusters)),
        "ece": _hundreds(ece(p, y)),
        "bins": [
            {
                "low": _hundreds(own.low),
                "high": _hundreds(own.high),
                "n": own.n,
                "predicted": _hundreds(own.predicted),
                "share": _hundreds(own.share),
                "ci95": [_hundreds(end) for end in own.ci95],
            }
            for own in bins_of(p, y, clusters)
        ],
    }


def _hundreds(value: float) -> float:
    return round(100 * value, DIGITS)


def population_map(people: Sequence[Person], sampler: DensitySampler) -> Map:
    """Where people live on the map of the bank that a sampler was fitted on.

    Args:
        people: Of that bank.
        sampler: With 2 components.
    """
    x, y, density = density_grid(sampler, CELLS)
    edges = np.quantile(sampler.log_density_, [1 - share / 100 for share in HELD])
    shades = np.searchsorted(edges, density, side="right")
    places = sampler.locate([who.profile for who in people])
    shown = shades > 0
    shown[[np.abs(y - place[1]).argmin() for place in places], [np.abs(x - place[0]).argmin() for place in places]] = True
    rows, columns = (_ends(np.flatnonzero(shown.any(axis=axis))) for axis in (1, 0))
    return {
        "layout": sampler.layout_,
        "profiles": len(sampler.bank),
        "held": list(HELD),
        "x": _edges(x, columns),
        "y": _edges(y, rows),
        "shades": ["".join(map(str, row)) for row in shades[rows, columns][::-1]],
        "people": {who.id: [round(float(v), DIGITS) for v in place] for who, place in zip(people, places, strict=True)},
    }


def _ends(cells: npt.NDArray[np.int64]) -> slice:
    """From the first of the cells that show something to the last, and some room."""
    return slice(max(0, int(cells[0]) - ROOM), int(cells[-1]) + ROOM + 1)


def _edges(centres: FloatArray, kept: slice) -> list[float]:
    """Outer edges of the cells that are kept."""
    half = (centres[1] - centres[0]) / 2
    return [round(float(centres[kept][0] - half), DIGITS), round(float(centres[kept][-1] + half), DIGITS)]
