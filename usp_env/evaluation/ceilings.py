"""Real people as rows of the card: what a simulated user could reach, and where it is no better than somebody else's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from usp_env.dialogue import Dialogue, Message
from usp_env.evaluation import conversation, said, shape, utterance
from usp_env.evaluation.card import Level
from usp_env.evaluation.columns import Column, Measured, Measurement, Missing
from usp_env.evaluation.conversation import Talk
from usp_env.evaluation.people import Person
from usp_env.evaluation.scorers import Scorers
from usp_env.evaluation.spoken import SAID, Job, Spoken, jobs

HALVES = "a person's odd turns against their even turns"
OTHER = "against the one of train with the nearest objective facts"
_PEOPLE = Missing("the people are the reference")


def real(
    level: Level, people: Sequence[Person], everyone: Sequence[Person], turns: int, most: int | None, scorers: Scorers
) -> Measurement:
    """The people's own turns under every metric; similarities are between the halves of a person's turns."""
    found = _utterances(people, most, scorers) if level == "utterance" else _conversations(people, everyone, turns, scorers)
    return replace(found, rows=())


def _utterances(people: Sequence[Person], most: int | None, scorers: Scorers) -> Measurement:
    todo = _turns(people, most)
    spoken = [Spoken(*job.key, job.person.turns[job.turn], False, SAID) for job in todo]
    found = utterance.measure(todo, spoken, True, scorers)
    turns = _by_person(todo)
    odd, even, lengths = _pairs([own[::2] for own in turns], [own[1::2] for own in turns])
    likeness = said.likeness(odd, even, lengths, found.people, scorers)
    return replace(found, metrics={**found.metrics, **_noted(likeness, HALVES), "termination_f1": _PEOPLE})


def _conversations(people: Sequence[Person], everyone: Sequence[Person], turns: int, scorers: Scorers) -> Measurement:
    rows = [Talk(who, 0, who.dialogue, who.dialogue, who.dialogue, "user_ended", "completed") for who in people]
    found = conversation.measure(rows, True, turns, scorers)
    halves = [(_only(who.turns[::2]), _only(who.turns[1::2])) for who in people]
    odd, even = ([_joined(pair[k]) for pair in halves] for k in (0, 1))
    ids = [who.id for who in people]
    likeness = said.likeness(odd, even, [1] * len(people), ids, scorers)
    distance = shape.adv(
        {"real": ([pair[1] for pair in halves], [pair[0] for pair in halves])},
        {"real": ids},
        _dialogues(everyone),
        scorers,
        False,
    )["real"]
    metrics: dict[str, Measured] = {
        **found.metrics,
        **_noted(likeness, HALVES),
        **_noted({"adv": distance}, HALVES),
        "dp_p": found.metrics["r_dp_r"],
        "dp_r": found.metrics["r_dp_p"],
        "dpc": found.metrics["r_dpc"],
        "user_turns": Column(
            np.array([min(len(who.turns), turns) for who in people], np.float64), "count", note=f"capped at {turns}"
        ),
        "turn_count_distance": _PEOPLE,
        "ended_by_user": Column(
            np.array([float(who.ended) for who in people]), "end of the conversation", note="not cut by the collection"
        ),
        "collapse": Missing("each person had one conversation"),
    }
    return replace(found, metrics=metrics)


def neighbour(
    level: Level,
    people: Sequence[Person],
    others: Mapping[str, Dialogue],
    everyone: Sequence[Person],
    most: int | None,
    scorers: Scorers,
) -> Measurement:
    """Similarities of the people and their topical neighbours.

    Args:
        level: Turn by turn, as far as both go, or all turns together.
        people: The people who have a neighbour count.
        others: Person to the neighbour's real conversation.
        everyone: Of the split, for ADV's plane.
        most: Most turns of a person.
        scorers: The models.
    """
    kept = [who for who in people if who.id in others]
    theirs = [[turn for turn in others[who.id].utterances("user") if turn.strip()] for who in kept]
    ids = tuple(who.id for who in kept)
    if level == "utterance":
        turns = _by_person(_turns(kept, most))
        flat, real_turns, lengths = _pairs(theirs, turns)
        return Measurement(ids, _noted(said.likeness(flat, real_turns, lengths, ids, scorers), OTHER))
    mine, other = [_only(who.turns) for who in kept], [_only(turns) for turns in theirs]
    likeness = said.likeness([_joined(d) for d in other], [_joined(d) for d in mine], [1] * len(kept), ids, scorers)
    distance = shape.adv({"other": (mine, other)}, {"other": ids}, _dialogues(everyone), scorers, False)["other"]
    return Measurement(ids, _noted({**likeness, "adv": distance}, OTHER))


def _turns(people: Sequence[Person], most: int | None) -> list[Job]:
    """The turns of people, without the decisions behind their ends."""
    return [job for job in jobs(people, [0], most) if job.turn < len(job.person.turns)]


def _by_person(todo: Sequence[Job]) -> list[list[str]]:
    """The real turns that jobs name, person by person."""
    turns: dict[str, list[str]] = {}
    for job in todo:
        turns.setdefault(job.person.id, []).append(job.person.turns[job.turn])
    return list(turns.values())


def _pairs(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> tuple[list[str], list[str], list[int]]:
    """First with first, second with second, as far as both go: flat lists, and how many pairs each person has."""
    pairs = [list(zip(x, y, strict=False)) for x, y in zip(a, b, strict=True)]
    return [x for own in pairs for x, _ in own], [y for own in pairs for _, y in own], [len(own) for own in pairs]


def _noted(metrics: Mapping[str, Measured], note: str) -> dict[str, Measured]:
    return {name: replace(found, note=note) if isinstance(found, Column) else found for name, found in metrics.items()}


def _only(turns: Sequence[str]) -> Dialogue:
    return Dialogue(tuple(Message("user", turn) for turn in turns))


def _joined(dialogue: Dialogue) -> str:
    return " ".join(dialogue.utterances("user"))


def _dialogues(people: Sequence[Person]) -> list[Dialogue]:
    return [who.dialogue for who in people]
