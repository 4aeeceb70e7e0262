"""The utterance level: after the real context of each real user turn, the simulated user says that one turn.

One more decision falls where the person ended the conversation: does the user end there too, and nowhere before?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from usp_env.dialogue import Dialogue, Message
from usp_env.evaluation import said
from usp_env.evaluation.columns import Column, Mask, Measured, Measurement, Missing
from usp_env.evaluation.scorers import Scorers
from usp_env.evaluation.spoken import ENDED, SAID, Job, Spoken, context
from usp_env.metrics import continuity
from usp_env.metrics.consistency import DialogueTurns

OPENINGS = "openings are in the mean, but in no difference: without context and profile nothing tells it what to say"
PERPLEXITY = Missing("training.perplexity measures it, of local models")


def measure(todo: Sequence[Job], spoken: Sequence[Spoken], given: bool, scorers: Scorers) -> Measurement:
    """Metrics of one user; a row is a person under a seed.

    Args:
        todo: All jobs of the user.
        spoken: What came of them.
        given: Whether the user was given the profile.
        scorers: The models.
    """
    # Every job has an answer and so a place: differences put the same turn of two users side by side.
    answers = {job.key: Spoken(*job.key, "", False, "infra_failure") for job in todo} | {one.key: one for one in spoken}
    rows: dict[tuple[str, int], list[Job]] = {}
    for job in todo:
        rows.setdefault((job.person.id, job.seed), []).append(job)
    groups = list(rows.values())
    turns = [[job for job in group if job.turn < len(job.person.turns)] for group in groups]
    flat, lengths = [job for group in turns for job in group], [len(group) for group in turns]
    texts = [answers[job.key].text for job in flat]
    own = [DialogueTurns(tuple(answers[job.key].text for job in group)) for group in turns]
    shown = [_shown(job, text) for job, text in zip(flat, texts, strict=True)]
    people = [group[0].person for group in groups]
    ids = tuple(who.id for who in people)
    likeness = said.likeness(texts, [job.person.turns[job.turn] for job in flat], lengths, ids, scorers)
    counts = {"turns": sum(map(bool, texts)), "ended": sum(answers[job.key].outcome == ENDED for job in flat)}
    note = "" if given else OPENINGS
    profiles = [job.person.profile for job in flat]
    metrics: dict[str, Measured] = {
        **{name: replace(like, detail={**like.detail, **counts}, note=note) for name, like in likeness.items()},
        **said.manner(own, [who.profile for who in people], scorers),
        "copy_rate_assistant": said.of_turns(continuity.copied_from_assistant(shown), lengths, "4-grams", note="mean over turns"),
        "sc_score": said.subjective(profiles, shown, lengths, scorers, given),
        "termination_f1": _termination(groups, answers),
        "perplexity": PERPLEXITY,
    }
    outcomes = Counter(answers[job.key].outcome for group in groups for job in group)
    invalid = {outcome: n for outcome, n in sorted(outcomes.items()) if outcome not in (SAID, ENDED)}
    facts: list[dict[str, Any]] = [{"seed": group[0].seed, "turns": n} for group, n in zip(groups, lengths, strict=True)]
    return Measurement(ids, metrics, invalid, len(todo), facts, _compared(turns, answers, given))


def _compared(turns: Sequence[Sequence[Job]], answers: Mapping[tuple[str, int, int], Spoken], given: bool) -> Mask:
    """The turns that a user said, but for those of which nothing told it what to say: no context and no profile."""
    said_it = [[bool(answers[job.key].text) and bool(given or context(job.person, job.turn)) for job in own] for own in turns]
    width = max(map(len, said_it), default=0)
    return np.array([row + [False] * (width - len(row)) for row in said_it], bool).reshape(len(turns), width)


def _shown(job: Job, text: str) -> Dialogue:
    """The generated turn behind the one that it answers; no turn where nothing was said."""
    before = context(job.person, job.turn)[-1:]
    return Dialogue((*before, *((Message("user", text),) if text else ())))


def _termination(groups: Sequence[Sequence[Job]], answers: Mapping[tuple[str, int, int], Spoken]) -> Measured:
    """Termination F1 over the decisions that were made: after each assistant turn that the context ends on."""
    predicted, actual = [], []
    for group in groups:
        decisions = [job for job in group if context(job.person, job.turn)]
        decided = [job for job in decisions if answers[job.key].outcome in (SAID, ENDED)]
        predicted.append([answers[job.key].ended for job in decided])
        actual.append([job.turn == len(job.person.turns) for job in decided])
    counts = continuity.termination_counts(predicted, actual)
    if not any(map(len, predicted)):
        return Missing("no decision: no conversation has a known end, or no generation succeeded")
    found = continuity.termination(counts)
    hits, alarms, missed = counts.T.astype(np.float64)
    detail = {
        "precision": None if np.isnan(found.precision) else 100 * found.precision,
        "recall": None if np.isnan(found.recall) else 100 * found.recall,
        "ends": int((hits + missed).sum()),
        "decisions": sum(map(len, predicted)),
    }
    parts = (2 * hits, 2 * hits + alarms + missed)
    per_row = np.divide(*parts, out=np.full(len(counts), np.nan), where=parts[1] > 0)
    return Column(per_row, "end token", "ratio", parts, detail=detail, note="all decisions together")
