"""How the benchmark's episodes are played: openings first, then every assistant, each population a run directory of its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from usp_env.driver import Conductor
from usp_env.episode import Episode
from usp_env.errors import RunDirectoryError, SpecError, UspError
from usp_env.evaluation.card import COST
from usp_env.evaluation.leaderboard import BOARD
from usp_env.evaluation.protocol import Plan, Protocol
from usp_env.files import read_text, write_whole
from usp_env.ledger import FILE as LEDGER
from usp_env.records import EpisodeSpec
from usp_env.rollout import roll
from usp_env.transcripts import FILE, RUN, RunDirectory, Transcript, read_config, read_transcripts
from usp_env.users.base import Partner

RUNS, OPENINGS, VERDICTS, DUELS, JUDGE = "runs", "openings.jsonl", "verdicts.jsonl", "duels.jsonl", "judge.json"
MARKDOWN = "leaderboard.md"
LANES = 16
"""Conversations at a time, and size of the groups that a killed run begins again."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Bench:
    """What all assistants share.

    Args:
        out: The benchmark's directory.
        protocol: As it is run.
        conductor: User, sampler, reward and rules.
        plan: The episodes, openings included.
        lanes: See `LANES`.
        say: Told what happens.
    """

    out: Path
    protocol: Protocol
    conductor: Conductor
    plan: Plan
    lanes: int
    say: Say


class Run(RunDirectory):
    """A run directory that takes every episode once: of a group that is rolled again, only what is missing."""

    def write_episode(self, episode: Episode, conductor: Conductor) -> None:
        """Append a finished episode unless it is there."""
        if episode.id not in self.finished:
            super().write_episode(episode, conductor)


def clear(folder: Path) -> None:
    """Delete what an earlier benchmark wrote here, and nothing else that lies here.

    What was made from another file goes before it, `run.json` last: a kill in here leaves a part of that benchmark which can be
    resumed, and nothing of it that could pass for a part of the next.
    """
    runs = [file.parent for file in folder.glob(f"{RUNS}/*/*/{RUN}") if _is_ours(file.parent)]
    made = [folder / name for name in (BOARD, MARKDOWN, COST, DUELS)]
    made += [path.parent / VERDICTS for path in runs] + [folder / JUDGE]
    made += [path / name for path in runs for name in (RUN, FILE, LEDGER)] + [folder / OPENINGS, folder / RUN]
    for file in made:
        file.unlink(missing_ok=True)
    for place in dict.fromkeys([*runs, *(path.parent for path in runs)]):
        if not any(place.iterdir()):
            place.rmdir()


def _is_ours(path: Path) -> bool:
    """Whether `play` wrote a run directory: `--out` may be a folder in which other programs keep their `runs`."""
    try:
        return {"populations", "population", "assistant"} <= set(read_config(path))
    except RunDirectoryError:
        return False


def play(bench: Bench, name: str, speaker: Partner) -> list[Transcript]:
    """All episodes of one assistant, read back from their run directories."""
    if speaker.role != "assistant":
        raise SpecError(f"{name!r}: expected a speaker of the assistant's seat, got one of the {speaker.role}'s")
    conductor, found = bench.conductor, []
    for population, specs in bench.plan.episodes.items():
        path = bench.out / RUNS / slug(name) / population
        config = {**asdict(bench.protocol), "population": population, "assistant": speaker.spec, "lanes": bench.lanes}
        known = (path / RUN).is_file()
        record = Run(path, config, known, not known, conductor.provenance(speaker))
        record.models = {"user": conductor.partner.spec, "assistant": speaker.spec}
        conductor.record = record
        try:
            _roll_groups(bench, speaker, specs, record)
        finally:
            conductor.record = None
        by_id = {transcript.episode_id: transcript for transcript in read_transcripts(path)}
        found += [by_id[episode_id(spec)] for spec in specs]
        failed = sum(not t.valid for t in found[-len(specs) :])
        bench.say(f"{name} × {population}: {len(specs)} episodes" + (f", {failed} invalid" if failed else ""))
    return found


def spent(bench: Bench, name: str) -> dict[str, Any]:
    """What one assistant's runs took, by population: their ledgers."""
    files = {population: bench.out / RUNS / slug(name) / population / LEDGER for population in bench.plan.episodes}
    return {population: json.loads(read_text(file, RunDirectoryError)) for population, file in files.items() if file.is_file()}


def _roll_groups(bench: Bench, speaker: Partner, specs: Sequence[EpisodeSpec], record: RunDirectory) -> None:
    for start in range(0, len(specs), bench.lanes):
        group = specs[start : start + bench.lanes]
        missing = [spec for spec in group if episode_id(spec) not in record.finished]
        if missing:
            # In this process a text's last bits depend on what else is in the batch, so a group is whole or not at all.
            local = [forget(one) for one in (bench.conductor.partner, speaker)]
            roll(bench.conductor, speaker, group if any(local) else missing, bench.lanes)


def forget(speaker: Partner) -> bool:
    """Drop what a speaker's engine keeps from call to call; whether it is one that keeps anything."""
    drop = getattr(getattr(speaker, "backend", None), "forget", None)
    if drop is not None:
        drop()
    return drop is not None


def episode_id(spec: EpisodeSpec) -> str:
    """The id of the episode that a spec begins."""
    return f"{spec.episode_seed:014x}"


def slug(name: str) -> str:
    """A folder's name for a spec: readable, and no two specs share one.

    Example:
        >>> slug("openai:gpt-4o@https://x/v1")
        'openai-gpt-4o-https-x-v1-8f7a62'
    """
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def with_openings(bench: Bench) -> Plan:
    """The plan with every episode's opening, read from the directory or made now."""
    file, specs = bench.out / OPENINGS, bench.plan.all
    if not file.is_file():
        found: dict[str, str | None] = {}
        for start in range(0, len(specs), bench.lanes):
            forget(bench.conductor.partner)
            found.update(_openings(bench.conductor, specs[start : start + bench.lanes]))
        lines = [json.dumps({"episode_id": key, "opening": text}, ensure_ascii=False) for key, text in found.items()]
        write_whole(file, "".join(line + "\n" for line in lines))
        bench.say(f"{len(found)} openings")
    records = [json.loads(line) for line in read_text(file, RunDirectoryError).split("\n") if line]
    known = {record["episode_id"]: record["opening"] for record in records}
    if missing := [spec for spec in specs if episode_id(spec) not in known]:
        raise RunDirectoryError(f"{file}: expected an opening for each episode, {len(missing)} are missing: begin anew")
    episodes = {
        population: tuple(replace(spec, opening=known[episode_id(spec)]) for spec in own)
        for population, own in bench.plan.episodes.items()
    }
    return replace(bench.plan, episodes=episodes)


def _openings(conductor: Conductor, specs: Sequence[EpisodeSpec]) -> dict[str, str | None]:
    """Episode id to the user's first words; None where the user has none to say, which fails that episode for everybody."""
    rng = np.random.default_rng(0)  # a spec fixes its episode: nothing is drawn from it
    episodes = [conductor.new_episode(rng, {"episode": spec}) for spec in specs]
    conductor.run(episodes)
    for episode in episodes:
        if episode.end_reason == "infra":
            raise UspError(
                f"the opening of {episode.spec.profile_id!r} could not be made ({episode.error}): try again with --resume"
            )
    return {episode.id: episode.messages[0].content if episode.messages else None for episode in episodes}
