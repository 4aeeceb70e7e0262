"""The conversation level: the simulated user talks with an assistant, from its profile or from the person's own first turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from usp_env.dialogue import Dialogue
from usp_env.env import make_conductor
from usp_env.episode import Episode
from usp_env.errors import SpecError
from usp_env.evaluation import said, shape
from usp_env.evaluation.columns import Column, Measured, Measurement, with_twin
from usp_env.evaluation.people import Person, digest
from usp_env.evaluation.scorers import Scorers
from usp_env.evaluation.spoken import episode_seed
from usp_env.evaluation.utterance import PERPLEXITY
from usp_env.metrics import consistency, continuity
from usp_env.metrics.authenticity import joined
from usp_env.metrics.consistency import DialogueTurns, ProfileText, harmonic_mean
from usp_env.profiles import ProfileBank
from usp_env.records import EpisodeSpec
from usp_env.rollout import roll
from usp_env.sampling.base import UniformSampler
from usp_env.transcripts import RUN, RunDirectory, Transcript, read_transcripts
from usp_env.users.base import Partner

POPULATION = "evaluated"


@dataclass(frozen=True, slots=True)
class Talk:
    """One simulated conversation beside the real one; a row of the measurement.

    Args:
        person: Whose profile.
        seed: Of the evaluation.
        dialogue: All of it; empty where the episode is not valid.
        own: From the first turn that the user said by itself; see `real`.
        real: The person's conversation, from the same turn on.
        end_reason: Of the episode; None where it is not valid.
        outcome: Of the episode.
    """

    person: Person
    seed: int
    dialogue: Dialogue
    own: Dialogue
    real: Dialogue
    end_reason: str | None
    outcome: str


class UserSampler(UniformSampler):
    """The people of an evaluation."""

    populations: Sequence[str] = (POPULATION,)


# ── talking ──────────────────────────────────────────────────────────────────────────────────────


def hold(
    user: Partner,
    given: bool,
    assistant: Partner,
    people: Sequence[Person],
    seed: int,
    folder: Path,
    *,
    turns: int = 10,
    resume: bool = False,
    overwrite: bool = False,
    lanes: int = 16,
    watch: Callable[[int, int], None] | None = None,
) -> list[Transcript]:
    """Let the user talk with the assistant as every person, and record it; episodes that are on disk are not held again.

    Args:
        user: The simulated user.
        given: Whether it is given the profile; else the person's first turn opens.
        assistant: The response model.
        people: Whom it plays.
        seed: Of the evaluation.
        folder: A run directory.
        turns: Most user turns.
        resume: Go on with what is there.
        overwrite: Begin anew.
        lanes: Most conversations at a time.
        watch: Called as conversations end, with how many are done and how many there are.
    """
    sampler = UserSampler(ProfileBank([who.profile for who in people], "evaluated"))
    conductor = make_conductor(user, sampler, None, "assistant", population=POPULATION, max_turns=turns)
    config = {"user": user.spec, "assistant": assistant.spec, "turns": turns, "seed": seed, "people": digest(people)}
    begun = (folder / RUN).is_file()  # what was killed before has said nothing yet
    record = RunDirectory(folder, config, resume and begun, overwrite or not begun, conductor.provenance(assistant))
    record.models = {"user": user.spec, "assistant": assistant.spec}
    conductor.record = record
    specs = [EpisodeSpec(who.id, POPULATION, episode_seed(who, seed), None if given else _opening(who), {}) for who in people]
    waiting = [spec for spec in specs if f"{spec.episode_seed:014x}" not in record.finished]
    done = [len(specs) - len(waiting)]

    def count(moved: Sequence[Episode]) -> None:
        if ended := sum(episode.done for episode in moved):
            done[0] += ended
            if watch is not None:
                watch(done[0], len(specs))

    roll(conductor, assistant, waiting, lanes, count)
    return read_transcripts(folder)


def _opening(person: Person) -> str:
    return next(turn for turn in person.turns if turn.strip())


def talks(
    people: Sequence[Person], transcripts: Mapping[int, Sequence[Transcript]], given: bool, paper: bool = False
) -> list[Talk]:
    """A row for each person under each seed, valid or not.

    A first turn that was given is the person's own: it is left out of what is compared, on both sides.

    Args:
        people: Who was played.
        transcripts: Seed to the episodes.
        given: Whether the user was given the profile.
        paper: Leave the given turn in, as the paper does.
    """
    rows = []
    for seed, episodes in transcripts.items():
        by_person = {episode.profile_id: episode for episode in episodes}
        for person in people:
            episode = by_person.get(person.id)
            outcome = episode.outcome if episode else "infra_failure"
            if episode is None or outcome != "completed":
                rows.append(Talk(person, seed, Dialogue(), Dialogue(), person.dialogue, None, outcome))
                continue
            dialogue = episode.dialogue()
            skip = not given and not paper
            own, real = (_after_first(talk) if skip else talk for talk in (dialogue, person.dialogue))
            rows.append(Talk(person, seed, dialogue, own, real, episode.end_reason, outcome))
    return rows


def without_openings(rows: Sequence[Talk]) -> list[Talk]:
    """The rows of a user that opened by itself as they stand beside those of a user whose first turn was given."""
    return [replace(row, own=_after_first(row.own), real=_after_first(row.real)) for row in rows]


def _after_first(dialogue: Dialogue) -> Dialogue:
    """Without everything up to the first user turn that says something."""
    first = next((k for k, m in enumerate(dialogue) if m.role == "user" and m.content.strip()), len(dialogue))
    return Dialogue(dialogue.messages[first + 1 :])


# ── measuring ────────────────────────────────────────────────────────────────────────────────────


def measure(rows: Sequence[Talk], given: bool, turns: int, scorers: Scorers) -> Measurement:
    """Metrics of one user but for ADV, which compares users (`adv`).

    Args:
        rows: See `talks`.
        given: Whether the user was given the profile.
        turns: Most user turns of a conversation.
        scorers: The models.
    """
    own = [DialogueTurns.of(row.own) for row in rows]
    profiles = [row.person.profile for row in rows]
    generated, real = joined([row.own for row in rows]), joined([row.real for row in rows])
    people = [row.person for row in rows]
    firsts = [next((turn for turn in one.turns if turn.strip()), "") for one in own]
    manner = said.manner(own, profiles, scorers)
    metrics: dict[str, Measured] = {
        **said.likeness(generated, real, [1] * len(rows), [who.id for who in people], scorers),
        **manner,
        **_recall(own, [ProfileText.of(profile) for profile in profiles], manner["r_dp_p"], scorers),
        "copy_rate_assistant": Column(continuity.copied_from_assistant([row.own for row in rows]), "4-grams"),
        "sc_score": said.subjective(profiles, [row.own for row in rows], [1] * len(rows), scorers, given),
        **shape.length([DialogueTurns.of(row.dialogue) for row in rows], [row.end_reason for row in rows], people, turns),
        **shape.words(own),
        **shape.population(generated, firsts, [who.id for who in people], [row.seed for row in rows], given, scorers),
        "perplexity": PERPLEXITY,
    }
    outcomes = Counter(row.outcome for row in rows)
    facts: list[dict[str, Any]] = [{"seed": row.seed, "end_reason": row.end_reason, "outcome": row.outcome} for row in rows]
    invalid = {outcome: n for outcome, n in sorted(outcomes.items()) if outcome != "completed"}
    return Measurement(tuple(who.id for who in people), metrics, invalid, len(rows), facts)


def _recall(
    own: Sequence[DialogueTurns], given: Sequence[ProfileText], precision: Measured, scorers: Scorers
) -> dict[str, Measured]:
    """r-DP.R, and r-DPC out of it and r-DP.P."""
    if not isinstance(precision, Column):
        raise SpecError(f"r_dp_p: expected a column, got {precision!r:.80}")
    shown = [Column(consistency.r_dp_r(own, given, facts), name) for facts, name in scorers.facts.both()]
    both = [
        Column(harmonic_mean(p.values, r.values), r.scorer, "harmonic", (p.values, r.values))
        for p, r in zip([precision, precision.twin], shown, strict=False)
        if p is not None
    ]
    return {"r_dp_r": with_twin(shown), "r_dpc": with_twin(both)}


def adv(rows: Mapping[str, Sequence[Talk]], reference: Sequence[Dialogue], scorers: Scorers, paper: bool) -> dict[str, Measured]:
    """ADV of every user; see `usp_env.evaluation.shape.adv`.

    Args:
        rows: User to its talks.
        reference: Real dialogues of the whole split, which the plane is fitted on.
        scorers: `embed` is asked.
        paper: Both sides' turns count, and the plane is fitted on all that is compared.
    """
    pairs = {user: ([row.real for row in own], [row.own for row in own]) for user, own in rows.items()}
    return shape.adv(pairs, {user: [row.person.id for row in own] for user, own in rows.items()}, reference, scorers, paper)
