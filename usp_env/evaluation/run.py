"""An evaluation from its plan to its card. Everything that a model generates is on disk before anything is scored.

DIR/run.json                          what is evaluated; a resumed run must share it
DIR/users/NAME/utterances.jsonl       utterance level, one generation a line
DIR/users/NAME/seed-0/                conversation level, a run directory (`usp-env show`, `usp-env report`)
DIR/judge.sqlite                      the judge's verdicts
DIR/scores.jsonl                      every metric of every person, for a look at the worst
DIR/card.json, card.md, cost.json     what came of it
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from usp_env.errors import SpecError
from usp_env.evaluation import assemble, ceilings, conversation, spoken, utterance
from usp_env.evaluation.card import CARD, COST, MARKDOWN, NEIGHBOUR, REAL, Card, Level, write_card
from usp_env.evaluation.columns import Measurement
from usp_env.evaluation.conversation import Talk
from usp_env.evaluation.making import make_card
from usp_env.evaluation.markdown import markdown
from usp_env.evaluation.people import digest
from usp_env.evaluation.plan import Candidate, Plan
from usp_env.evaluation.scorers import Scorers
from usp_env.evaluation.spoken import Spoken
from usp_env.files import write_whole
from usp_env.ledger import Ledger
from usp_env.transcripts import FILE, RUN, RunDirectory, Transcript, check_free
from usp_env.users.base import ModelSpeaker, Partner

SCORES, UTTERANCES, USERS, JUDGE = "scores.jsonl", "utterances.jsonl", "users", "judge.sqlite"
Report = Callable[[str], None]


def evaluate(
    users: Sequence[Candidate],
    assistant: Partner | None,
    plan: Plan,
    scorers: Scorers,
    folder: Path,
    card_file: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda text: None,
) -> Card:
    """Generate what is missing, score it, write the card.

    Args:
        users: Simulated users, names unique.
        assistant: The response model; not needed for the utterance level.
        plan: See there.
        scorers: Asked once everything has been generated.
        folder: Where the run is written.
        card_file: Where the card goes; default: `card.json` of the folder.
        resume: Go on with the run that is there; what it generated is not generated again.
        overwrite: Begin anew over it.
        report: Told what goes on.

    Raises:
        RunDirectoryError: The folder is taken, or holds a run of something else.
        SpecError: Two users of one name, or no assistant to talk with.
    """
    if len({user.name for user in users}) < len(users) or {user.name for user in users} & {REAL, NEIGHBOUR}:
        raise SpecError(f"users: expected names that differ from one another and from {REAL}, got {[u.name for u in users]}")
    if assistant is None and "conversation" in plan.levels:
        raise SpecError("the conversation level needs an assistant to talk with")
    _begin(folder, users, assistant, plan, scorers, resume, overwrite)
    turns = {user.name: _utterances(user, plan, folder, report) for user in users if "utterance" in plan.levels}
    held = {
        user.name: _conversations(user, assistant, plan, folder, resume, report)
        for user in users
        if assistant is not None and "conversation" in plan.levels
    }
    start = time.perf_counter()
    found = _measure(users, plan, scorers, turns, held, report)
    cost = {"users": _accounts(users, folder), "scoring_seconds": round(time.perf_counter() - start, 3)}
    card = make_card(users, assistant, plan, scorers, found)
    rows = [row for name, levels in found.items() for level, own in levels.items() for row in assemble.scores(name, level, own)]
    write_whole(folder / SCORES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    target = card_file or folder / CARD
    write_card(target, card)
    write_whole(target.with_suffix(".md") if card_file else folder / MARKDOWN, markdown(card, cost))
    write_whole(folder / COST, json.dumps(cost, indent=1) + "\n")
    return card


def _begin(
    folder: Path,
    users: Sequence[Candidate],
    assistant: Partner | None,
    plan: Plan,
    scorers: Scorers,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make the run directory, or see that it holds this run."""
    config = {
        "command": "evaluate",
        "users": {user.name: {"spec": user.speaker.spec, "profile": user.given} for user in users},
        "assistant": assistant.spec if assistant else None,
        "bank": plan.bank,
        "split": plan.split,
        "people": digest(plan.people),
        "everyone": digest(plan.everyone),
        "levels": list(plan.levels),
        "seeds": list(plan.seeds),
        "turns": plan.turns,
        "most": plan.most,
        "protocol": plan.protocol,
        "scorers": scorers.names(),
        "judge": scorers.judge.name if scorers.judge else None,
    }
    speakers = [user.speaker for user in users] + ([assistant] if assistant else [])
    provenance = {"models": {s.spec: dict(s.backend.identity) for s in speakers if isinstance(s, ModelSpeaker)}}
    fresh = check(folder, resume, overwrite)
    if overwrite:  # first of all: a run that is killed in here must not find the old generations when it is resumed
        shutil.rmtree(folder / USERS, ignore_errors=True)
        for name in (CARD, MARKDOWN, COST, SCORES):
            (folder / name).unlink(missing_ok=True)
    RunDirectory(folder, config, resume and not fresh, overwrite or fresh, provenance)
    (folder / FILE).unlink(missing_ok=True)  # the transcripts of this run are in its users' folders


def check(folder: Path, resume: bool = False, overwrite: bool = False) -> bool:
    """Raise `RunDirectoryError` unless a run may be written here as asked; returns whether one begins that was killed at once.

    A run has generated nothing before `run.json` is there; only the judge's empty store may lie beside it.
    """
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if names and names <= {JUDGE, *((FILE, f"{RUN}.new") if resume else ())}:
        return True
    check_free(folder, resume, overwrite)
    return False


# ── generating ───────────────────────────────────────────────────────────────────────────────────


def _utterances(user: Candidate, plan: Plan, folder: Path, report: Report) -> list[Spoken]:
    own = folder / USERS / user.slug
    own.mkdir(parents=True, exist_ok=True)
    todo = spoken.jobs(plan.people, plan.seeds, plan.most)

    def watch(done: int, of: int) -> None:
        report(f"{user.name}: {done} of {of} turns")

    spoken.generate(user.speaker, user.given, todo, own / UTTERANCES, lanes=plan.lanes, ledger=Ledger(own), watch=watch)
    return spoken.read(own / UTTERANCES)


def _conversations(user: Candidate, assistant: Partner, plan: Plan, folder: Path, resume: bool, report: Report) -> list[Talk]:
    transcripts: dict[int, list[Transcript]] = {}
    for seed in plan.seeds:
        transcripts[seed] = conversation.hold(
            user.speaker,
            user.given,
            assistant,
            plan.people,
            seed,
            _seed_folder(folder, user, seed),
            turns=plan.turns,
            resume=resume,
            lanes=plan.lanes,
            watch=lambda done, of, seed=seed: report(f"{user.name}: {done} of {of} conversations, seed {seed}"),  # type: ignore[misc]
        )
    return conversation.talks(plan.people, transcripts, user.given, plan.paper)


def _seed_folder(folder: Path, user: Candidate, seed: int) -> Path:
    return folder / USERS / user.slug / f"seed-{seed}"


def _accounts(users: Sequence[Candidate], folder: Path) -> dict[str, dict[str, Any]]:
    """What the run's ledgers hold, by user, level and speaker; seeds are added up."""
    out: dict[str, dict[str, Any]] = {}
    for user in users:
        own = folder / USERS / user.slug
        places: dict[str, list[Path]] = {"utterance": [own], "conversation": sorted(own.glob("seed-*"))}
        for level, folders in places.items():
            for place in folders:
                for role, account in Ledger(place).accounts.items():
                    known = out.setdefault(user.name, {}).setdefault(level, {}).get(role, {})
                    new = account.to_json()
                    keep = {key: value for key, value in new.items() if not key.startswith("call_")}
                    out[user.name][level][role] = {key: _plus(known.get(key), value) for key, value in keep.items()}
    return out


def _plus(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b


# ── scoring ──────────────────────────────────────────────────────────────────────────────────────


def _measure(
    users: Sequence[Candidate],
    plan: Plan,
    scorers: Scorers,
    turns: Mapping[str, Sequence[Spoken]],
    held: Mapping[str, Sequence[Talk]],
    report: Report,
) -> dict[str, dict[Level, Measurement]]:
    """Row of the card to level to what was found."""
    todo = spoken.jobs(plan.people, plan.seeds, plan.most)
    found: dict[str, dict[Level, Measurement]] = {user.name: {} for user in users}
    for user in users:
        if user.name in turns:
            report(f"{user.name}: scoring turns")
            found[user.name]["utterance"] = utterance.measure(todo, turns[user.name], user.given, scorers)
    if held:
        report("conversations: scoring")
        for name, own in _held(users, plan, scorers, held).items():
            found[name]["conversation"] = own
    report("real people: scoring")
    found[REAL] = {
        level: ceilings.real(level, plan.people, plan.everyone, plan.turns, plan.most, scorers) for level in plan.levels
    }
    if plan.neighbours:
        found[NEIGHBOUR] = {
            level: ceilings.neighbour(level, plan.people, plan.neighbours, plan.everyone, plan.most, scorers)
            for level in plan.levels
        }
    return found


def _held(users: Sequence[Candidate], plan: Plan, scorers: Scorers, held: Mapping[str, Sequence[Talk]]) -> dict[str, Measurement]:
    """The conversation level of every user; where some were given their first turns, of the others without theirs, too."""
    given = {user.name: user.given for user in users}

    def measure(rows: Mapping[str, Sequence[Talk]], scorers: Scorers) -> dict[str, Measurement]:
        distances = conversation.adv(rows, [who.dialogue for who in plan.everyone], scorers, plan.paper)
        found = {name: conversation.measure(own, given[name], plan.turns, scorers) for name, own in rows.items()}
        return {name: replace(own, metrics={**own.metrics, "adv": distances[name]}) for name, own in found.items()}

    found = measure(held, scorers)
    if plan.paper or all(given.values()) or not any(given.values()):
        return found
    rest = {name: conversation.without_openings(own) for name, own in held.items() if given[name]}
    later = measure(rest, replace(scorers, judge=None))  # who is given no profile has no SC.Score to compare with
    return {name: replace(own, later=later.get(name)) for name, own in found.items()}
