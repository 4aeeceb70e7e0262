"""Metrics of what was said, whichever level it was said at: likeness to the real turns, fit to the profile, manner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from usp_env.dialogue import Dialogue
from usp_env.evaluation.columns import Column, FloatArray, Mask, Measured, Missing, with_twin
from usp_env.evaluation.scorers import Scorers
from usp_env.metrics import authenticity, consistency, continuity, coverage, drift
from usp_env.metrics.authenticity import means_by_dialogue
from usp_env.metrics.consistency import DialogueTurns, ProfileText
from usp_env.metrics.judges import values
from usp_env.metrics.profile_judging import sc_score
from usp_env.metrics.statistics import person_means
from usp_env.profiles import Profile

SENSITIVITY = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15)
"""Offsets from the encoder's own threshold at which AVA is shown too."""


def of_turns(values: FloatArray, lengths: Sequence[int], scorer: str, **more: Any) -> Column:
    """A metric whose rows are means over turns.

    Args:
        values: Turn after turn, (k,); NaN: no judgement.
        lengths: Turns of each of m rows, summing to k.
        scorer: See `Column`.
        **more: See there.

    Example:
        >>> own = of_turns(np.array([0.2, 0.4, 0.9]), [2, 1], "rule")
        >>> own.values, own.among(np.array([[False, True], [True, True]]))
        (array([0.3, 0.9]), array([0.4, 0.9]))
    """

    def among(turns: Mask) -> FloatArray:
        kept = np.concatenate([row[:n] for row, n in zip(turns, lengths, strict=True)] or [np.zeros(0, bool)])
        return means_by_dialogue(np.where(kept, values, np.nan), lengths)

    return Column(means_by_dialogue(values, lengths), scorer, among=among, **more)


def likeness(
    generated: Sequence[str], real: Sequence[str], lengths: Sequence[int], people: Sequence[str], scorers: Scorers
) -> dict[str, Column]:
    """Sem-Sim, Style-Sim and AVA of pairs of texts, averaged within dialogues.

    Args:
        generated: (k,); blank where nothing was said.
        real: Their counterparts, (k,).
        lengths: Pairs of each of m dialogues, summing to k; all 1 where a dialogue is one pair.
        people: Whose they are, (m,).
        scorers: `embed` and `style` are asked.
    """
    meant = [of_turns(authenticity.sem_sim(generated, real, embed), lengths, name) for embed, name in scorers.embed.both()]
    styles = [(authenticity.style_sim(generated, real, style), name) for style, name in scorers.style.both()]
    threshold = scorers.style_threshold
    thresholds = [round(threshold + offset, 4) for offset in SENSITIVITY]
    similarity, name = styles[0]  # a threshold belongs to one encoder
    swept = [_over_people(means_by_dialogue(authenticity.ava(similarity, other), lengths), people) for other in thresholds]
    detail = {"threshold": threshold, "thresholds": thresholds, "sensitivity": [none_for_nan(100 * value) for value in swept]}
    return {
        "sem_sim": with_twin(meant),
        "style_sim": with_twin([of_turns(values, lengths, style) for values, style in styles]),
        "ava": of_turns(authenticity.ava(similarity, threshold), lengths, name, detail=detail),
    }


def _over_people(values: FloatArray, people: Sequence[str]) -> float:
    """The mean as the card takes it."""
    means = person_means(values, people)
    return float(np.mean(list(means.values()))) if means else np.nan


def manner(turns: Sequence[DialogueTurns], profiles: Sequence[Profile], scorers: Scorers) -> dict[str, Measured]:
    """What a user's own turns show: r-DP.P and its drift, P.Cover, human-likeness, copying, role drift; rows as given, (m,)."""
    given = [ProfileText.of(profile) for profile in profiles]
    kept, drifts = _kept(given, turns, scorers)
    lengths = [len(own.turns) for own in turns]
    each = [DialogueTurns((turn,)) for own in turns for turn in own.turns]
    texts = [[turn for turn in one.turns if turn.strip()] for one in each]
    human = [of_turns(authenticity.human_likeness(texts, model), lengths, name) for model, name in scorers.human.both()]
    drifted = [of_turns(continuity.role_drift(each, model), lengths, name) for model, name in scorers.human.both()]
    return {
        "r_dp_p": kept,
        "drift": drifts,
        "p_cover": Column(
            coverage.persona_coverage(turns, given),
            "word ranks",
            among=lambda kept: coverage.persona_coverage(_only(turns, kept), given),
        ),
        "human_likeness": with_twin(human),
        "copy_rate": Column(
            continuity.copied_from_profile(turns, given),
            "4-grams",
            among=lambda kept: continuity.copied_from_profile(_only(turns, kept), given),
        ),
        "role_drift": with_twin(drifted),
    }


def _only(turns: Sequence[DialogueTurns], kept: Mask) -> list[DialogueTurns]:
    """The others are blank, as what was never said."""
    return [
        DialogueTurns(tuple(turn if keep else "" for turn, keep in zip(own.turns, row, strict=False)))
        for own, row in zip(turns, kept, strict=True)
    ]


def _kept(given: Sequence[ProfileText], turns: Sequence[DialogueTurns], scorers: Scorers) -> tuple[Column, Column]:
    """r-DP.P and its slope over the turns, from one judgement of each turn: a row's mean is its r-DP.P."""
    kept, drifts = [], []
    for facts, name in scorers.facts.both():
        lines = drift.prompt_to_line(given, turns, facts)
        curve = drift.turn_curve(lines)
        kept.append(_of_lines(lines, _means, name))
        detail = {"turns": [none_for_nan(100 * value) for value in curve.mean], "dialogues": curve.dialogues.tolist()}
        drifts.append(replace(_of_lines(lines, drift.slope, name), detail=detail))
    return with_twin(kept), with_twin(drifts)


def _of_lines(lines: FloatArray, row_value: Callable[[FloatArray], FloatArray], scorer: str) -> Column:
    """A metric of values per turn, (m, t)."""

    def among(turns: Mask) -> FloatArray:
        return row_value(np.where(turns[:, : lines.shape[1]], lines, np.nan))

    return Column(row_value(lines), scorer, among=among)


def _means(lines: FloatArray) -> FloatArray:
    return np.array([consistency.mean_defined(row) for row in lines], np.float64).reshape(len(lines))


def none_for_nan(value: float, digits: int = 4) -> float | None:
    """A number for JSON, rounded: what shares a text's batch moves its scores by 1e-7."""
    return None if np.isnan(value) else round(float(value), digits)


def subjective(
    profiles: Sequence[Profile], dialogues: Sequence[Dialogue], lengths: Sequence[int], scorers: Scorers, given: bool = True
) -> Measured:
    """SC.Score of dialogues (or single turns), averaged within rows; missing without a judge, and without a profile.

    Args:
        profiles: (k,).
        dialogues: What is shown to the judge, (k,).
        lengths: Dialogues of each row.
        scorers: `judge` is asked.
        given: Whether the user was given its profile.
    """
    if not given:
        return Missing("the user is given no profile")
    if scorers.judge is None:
        return Missing("no judge: name one with --judge")
    verdicts = sc_score(scorers.judge, profiles, dialogues)
    failed = sum(np.isnan(verdict.value) and bool(verdict.error or verdict.retried) for verdict in verdicts)
    return of_turns(values(verdicts), lengths, scorers.judge.name, detail={"without_verdict": int(failed)} if failed else {})
