"""Metrics of what was said, whichever level it was said at: likeness to the real turns, fit to the profile, manner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from usp_env.dialogue import Dialogue
from usp_env.evaluation.columns import Column, Measured, Missing, with_twin
from usp_env.evaluation.scorers import Scorers
from usp_env.metrics import authenticity, consistency, continuity, coverage, drift
from usp_env.metrics.authenticity import means_by_dialogue
from usp_env.metrics.consistency import DialogueTurns, ProfileText
from usp_env.metrics.judges import values
from usp_env.metrics.profile_judging import sc_score
from usp_env.profiles import Profile

SENSITIVITY = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15)
"""Offsets from the encoder's own threshold at which AVA is shown too."""


def likeness(generated: Sequence[str], real: Sequence[str], lengths: Sequence[int], scorers: Scorers) -> dict[str, Column]:
    """Sem-Sim, Style-Sim and AVA of pairs of texts, averaged within dialogues.

    Args:
        generated: (k,); blank where nothing was said.
        real: Their counterparts, (k,).
        lengths: Pairs of each of m dialogues, summing to k; all 1 where a dialogue is one pair.
        scorers: `embed` and `style` are asked.
    """
    meant = [
        Column(means_by_dialogue(authenticity.sem_sim(generated, real, embed), lengths), name)
        for embed, name in scorers.embed.both()
    ]
    styles = [(authenticity.style_sim(generated, real, style), name) for style, name in scorers.style.both()]
    threshold = scorers.style_threshold
    thresholds = [round(threshold + offset, 4) for offset in SENSITIVITY]
    same = [
        Column(
            means_by_dialogue(authenticity.ava(similarity, threshold), lengths),
            name,
            detail={
                "threshold": threshold,
                "thresholds": thresholds,
                "sensitivity": [none_for_nan(100 * value) for value in authenticity.ava_sensitivity(similarity, thresholds)],
            },
        )
        for similarity, name in styles
    ]
    return {
        "sem_sim": with_twin(meant),
        "style_sim": with_twin([Column(means_by_dialogue(similarity, lengths), name) for similarity, name in styles]),
        "ava": same[0],  # a threshold belongs to one encoder
    }


def manner(turns: Sequence[DialogueTurns], profiles: Sequence[Profile], scorers: Scorers) -> dict[str, Measured]:
    """What a user's own turns show: r-DP.P and its drift, P.Cover, human-likeness, copying, role drift; rows as given, (m,)."""
    given = [ProfileText.of(profile) for profile in profiles]
    kept, drifts = _kept(given, turns, scorers)
    texts = [[turn for turn in own.turns if turn.strip()] for own in turns]
    human = [Column(authenticity.human_likeness(texts, model), name) for model, name in scorers.human.both()]
    drifted = [Column(continuity.role_drift(turns, model), name) for model, name in scorers.human.both()]
    return {
        "r_dp_p": kept,
        "drift": drifts,
        "p_cover": Column(coverage.persona_coverage(turns, given), "word ranks"),
        "human_likeness": with_twin(human),
        "copy_rate": Column(continuity.copied_from_profile(turns, given), "4-grams"),
        "role_drift": with_twin(drifted),
    }


def _kept(given: Sequence[ProfileText], turns: Sequence[DialogueTurns], scorers: Scorers) -> tuple[Column, Column]:
    """r-DP.P and its slope over the turns, from one judgement of each turn: a row's mean is its r-DP.P."""
    kept, drifts = [], []
    for facts, name in scorers.facts.both():
        lines = drift.prompt_to_line(given, turns, facts)
        curve = drift.turn_curve(lines)
        kept.append(Column(np.array([consistency.mean_defined(row) for row in lines], np.float64).reshape(len(turns)), name))
        detail = {"turns": [none_for_nan(100 * value) for value in curve.mean], "dialogues": curve.dialogues.tolist()}
        drifts.append(Column(drift.slope(lines), name, detail=detail))
    return with_twin(kept), with_twin(drifts)


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
    column = means_by_dialogue(values(verdicts), lengths)
    return Column(column, scorers.judge.name, detail={"without_verdict": int(failed)} if failed else {})
