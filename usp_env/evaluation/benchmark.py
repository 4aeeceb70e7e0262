"""The dynamic benchmark: assistants talk with the same simulated people, and a leaderboard comes out (paper Table 7, Figure 9).

    board = benchmark(["smollm2-135m", "echo", "known-bad"], "runs/bench")           writes leaderboard.json, leaderboard.md
    board.row("echo").average, board.difference("smollm2-135m", "echo", "minority")  Estimates

    OUT/run.json                     protocol, digests, versions          OUT/leaderboard.json, leaderboard.md
    OUT/openings.jsonl               every user's first words             OUT/judge.json, duels.jsonl: with a judge
    OUT/runs/ASSISTANT/POPULATION    a run directory each; verdicts.jsonl beside it with a judge
    OUT/cost.json                    tokens, seconds and dollars by assistant, population and role

The openings are made once, before any assistant speaks, so every assistant meets the same person with the same first words and
the same noise: comparisons are paired. Episodes are rolled in fixed groups and engines in this process forget their keys and
values before each, so that a run which was killed resumes to the same bytes; with `resume`, more assistants may be named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from usp_env import assistants as assistants_
from usp_env import users
from usp_env.backends import load as load_backend
from usp_env.backends.base import Backend
from usp_env.backends.scripted import ScriptedBackend
from usp_env.backends.spec import ModelSpec
from usp_env.env import make_conductor
from usp_env.errors import RunDirectoryError, SpecError
from usp_env.evaluation import validity
from usp_env.evaluation.benchmark_bootstrap import EpisodeScore
from usp_env.evaluation.benchmark_judging import Jury, gate, judge_duels, judge_episodes
from usp_env.evaluation.benchmark_play import (
    DUELS,
    JUDGE,
    LANES,
    MARKDOWN,
    RUNS,
    VERDICTS,
    Bench,
    Say,
    clear,
    play,
    slug,
    spent,
    with_openings,
)
from usp_env.evaluation.benchmark_scores import Results, results, with_twin
from usp_env.evaluation.card import COST
from usp_env.evaluation.leaderboard import BOARD, Leaderboard, Score
from usp_env.evaluation.protocol import USP_BENCH_1, Facts, Protocol, departures, draw, weights
from usp_env.files import read_text, write_whole
from usp_env.metrics.judges import Judge
from usp_env.rewards.base import RewardLike, WeightedSum, make_reward
from usp_env.rewards.goal import GoalProgress
from usp_env.sampling import Sampler, load_sampler
from usp_env.transcripts import RUN, Transcript, check_free, describe, note_resumed, read_config, versions
from usp_env.users.base import Partner


def benchmark(
    assistants: Sequence[str] | Mapping[str, Partner],
    out: str | Path,
    protocol: Protocol = USP_BENCH_1,
    *,
    user: Partner | None = None,
    sampler: Sampler | None = None,
    reward: RewardLike = None,
    judge: Judge | None = None,
    calibration: Jury | None = None,
    pairwise: bool = False,
    reference: str | Path | None = None,
    lanes: int = LANES,
    resume: bool = False,
    overwrite: bool = False,
    source: Callable[[ModelSpec], Backend] = load_backend,
    say: Say = lambda line: None,
) -> Leaderboard:
    """Let assistants talk with a protocol's people, and compare them.

    Args:
        assistants: Specs (see `usp_env.assistants` and `usp_env.evaluation.validity`), or names with live speakers.
        out: Directory that is written.
        protocol: See `Protocol`; anything but `USP_BENCH_1` is called modified.
        user: A live user in the place of the protocol's.
        sampler: Likewise.
        reward: Likewise.
        judge: Rates whole conversations in the place of the reward, once it has passed the gate.
        calibration: What the gate asks the judge; None takes real conversations of the bank's `val` split.
        pairwise: Let the judge also compare every two assistants' conversations, in both orders, for Elo.
        reference: JSON file of names and scores (more is better) that the ranking is correlated with.
        lanes: Conversations at a time.
        resume: Finish what is there; assistants may be added.
        overwrite: Begin anew over what is there.
        source: Gives the backends of model specs.
        say: Told what happens.

    Raises:
        RunDirectoryError: The directory is taken, or holds another benchmark.
        JudgeRefusedError: The judge did not pass the gate.
        UspError: An opening could not be made.
    """
    folder = Path(out)
    names = _names(assistants, pairwise and judge is None)
    check_free(folder, resume, overwrite)
    ranking = None if reference is None else (str(reference), _read_reference(Path(reference)))
    sampler = sampler or load_sampler(protocol.bank, None if protocol.split == "all" else protocol.split)
    scorer = make_reward(protocol.reward if reward is None else reward, "assistant")
    if scorer is None:
        raise SpecError("the benchmark needs a reward for its curves, even where a judge gives the scores")
    twin = _twin(scorer)  # loaded before anything is played, like the reward itself
    partner = user or users.load(protocol.user, source)
    live: dict[str, Any] = {"bank": sampler.bank.name, "user": partner.spec if user else protocol.user, "reward": scorer.name}
    protocol = replace(protocol, **live, judge="offline" if judge is None else judge.name)
    conductor = make_conductor(
        partner, sampler, scorer, "assistant", population=protocol.populations[0], max_turns=protocol.turns
    )
    plan, facts = draw(sampler, protocol), Facts.of(sampler, partner, scorer)
    bench = Bench(folder, protocol, conductor, plan, lanes, say)
    if not isinstance(assistants, Mapping):
        for name in names:  # a mistake in the last one should not cost the games of the others
            load_assistant(name, bench, lambda spec: ScriptedBackend([], spec=str(spec)))
    _begin(folder, _settings(bench, facts), resume, overwrite)
    report = gate(judge, calibration, folder / JUDGE) if judge is not None else None
    bench = replace(bench, plan=with_openings(bench))
    specs, digests, played = {}, {}, {}
    for name in names:
        speaker = assistants[name] if isinstance(assistants, Mapping) else load_assistant(name, bench, source)
        specs[name], digests[name], played[name] = speaker.spec, weights(speaker), play(bench, name, speaker)
    scores, wins = _scores(bench, played, judge), None
    if judge is not None and pairwise:
        wins = judge_duels(judge, played, folder / DUELS)
    found = results(scores, specs, protocol.turns, wins, ranking)
    found = replace(found, rows=[replace(row, weights=digests[row.assistant]) for row in found.rows])
    if twin is not None:
        found = with_twin(found, _scores_by(twin, bench, played))
    board = _board(bench, facts, found, judge, report)
    if twin is not None:
        board = replace(board, twin=Score(protocol.reward, twin.identity["scorer"], board.curve_score.unit))
    cost = json.dumps({name: spent(bench, name) for name in names}, ensure_ascii=False, indent=1) + "\n"
    for file, text in ((BOARD, board.to_json()), (MARKDOWN, board.markdown()), (COST, cost)):
        write_whole(folder / file, text)
    return board


def load_assistant(name: str, bench: Bench, source: Callable[[ModelSpec], Backend] = load_backend) -> Partner:
    """The assistant of a spec, or one of the benchmark's own anchors (`usp_env.evaluation.validity.ANCHORS`)."""
    if name in validity.ANCHORS:
        return validity.anchor(name, bench.plan.all, bench.conductor.sampler.bank, bench.protocol.turns)
    return assistants_.load(name, source)


# ── scoring ──────────────────────────────────────────────────────────────────────────────────────


def _scores(bench: Bench, played: Mapping[str, Sequence[Transcript]], judge: Judge | None) -> list[EpisodeScore]:
    found = [episode_score(name, transcript) for name, own in played.items() for transcript in own]
    if judge is None:
        return found
    told = {name: judge_episodes(judge, own, bench.out / RUNS / slug(name) / VERDICTS) for name, own in played.items()}
    return [_judged(score, told[score.assistant][score.episode]) for score in found]


def episode_score(assistant: str, transcript: Transcript) -> EpisodeScore:
    """The return of an episode, and its running sums, in percent; NaN where the episode is invalid."""
    sums = tuple(float(value) for value in 100 * np.cumsum(transcript.rewards))
    return EpisodeScore(
        assistant,
        transcript.population,
        transcript.profile_id,
        transcript.episode_id,
        (sums[-1] if sums else 0.0) if transcript.valid else float("nan"),
        transcript.outcome,
        transcript.end_reason,
        (sums or (0.0,)) if transcript.valid else (),
    )


def _twin(reward: WeightedSum) -> GoalProgress | None:
    """The reward by its held-out scorer; None where it has none."""
    (weight, part), *others = reward.parts
    return part.twin if isinstance(part, GoalProgress) and weight == 1 and not others else None


def _scores_by(twin: GoalProgress, bench: Bench, played: Mapping[str, Sequence[Transcript]]) -> list[EpisodeScore]:
    """What `episode_score` gives, with the values of another scorer on the same conversations."""
    found, bank = [], bench.conductor.sampler.bank
    for name, own in played.items():
        terms = twin([bank.get(t.profile_id) for t in own], [t.dialogue() for t in own])
        for transcript, told in zip(own, terms, strict=True):
            score = episode_score(name, transcript)
            value = 100 * told.value if told is not None and transcript.valid else float("nan")
            found.append(replace(score, value=value, curve=()))
    return found


def _judged(score: EpisodeScore, rating: float) -> EpisodeScore:
    valid = score.value == score.value
    return replace(
        score, value=rating if valid else score.value, outcome="unjudged" if valid and rating != rating else score.outcome
    )


def _board(bench: Bench, facts: Facts, found: Results, judge: Judge | None, report: Mapping[str, Any] | None) -> Leaderboard:
    protocol, plan = bench.protocol, bench.plan
    changed = departures(protocol, plan, facts)
    reward = Score(protocol.reward, _scorer(facts), "%" if protocol.reward == "goal" else "x 100")
    return Leaderboard(
        protocol=protocol.name + ("+modified" if changed else ""),
        modified=changed,
        settings=_settings(bench, facts),
        profiles={population: plan.people(population) for population in plan.episodes},
        caps=plan.why,
        score=reward if judge is None else Score("judge", judge.name, "1-10"),
        curve_score=reward,
        rows=found.rows,
        pairs=found.pairs,
        reference=found.reference,
        judge=report,
        versions=versions(),
    )


def _settings(bench: Bench, facts: Facts) -> dict[str, Any]:
    """The protocol as it is run, with what its names stood for."""
    own = {"user_spec": bench.conductor.partner.spec, "plan": bench.plan.digest, "lanes": bench.lanes}
    settings: dict[str, Any] = json.loads(json.dumps({**asdict(bench.protocol), **asdict(facts), **own}))
    return settings


def _scorer(facts: Facts) -> str:
    """What gave the reward's values, for people."""
    told = [str(part.get("scorer", name)) for name, part in facts.scorer.items()]
    return ", ".join(told) or "the reward"


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def _names(assistants: Sequence[str] | Mapping[str, Partner], no_judge: bool) -> list[str]:
    names = list(assistants)
    if isinstance(assistants, str) or not names or len({slug(name).casefold() for name in names}) != len(names):
        raise SpecError(f"assistants: expected at least one, each once, got {assistants!r:.120}")
    if "human" in names:
        raise SpecError("assistants: a person talks in usp-env chat; the benchmark holds many conversations at a time")
    if no_judge:
        raise SpecError("pairwise comparison is a judge's: name one, or leave it out (Elo then comes from the scores)")
    return names


def _begin(folder: Path, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """Write `run.json`, or check that a resumed run's says the same."""
    if overwrite:  # first of all: a run that is killed from here on must find nothing of the old one when it is resumed
        clear(folder)
    if resume and (folder / RUN).is_file():
        before = read_config(folder)
        changed = [
            f"{key}: {before.get(key)!r:.60} → {config.get(key)!r:.60}"
            for key in {**before, **config}
            if before.get(key) != config.get(key)
        ]
        if changed:
            raise RunDirectoryError(
                f"{str(folder)!r} holds another benchmark ({'; '.join(changed)}): use another directory, or bring that back"
            )
        note_resumed(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN, json.dumps(describe(config), indent=1, ensure_ascii=False) + "\n")


def _read_reference(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SpecError(f"reference {str(file)!r}: expected a JSON file of names and scores, there is none")
    try:
        read = json.loads(read_text(file, SpecError))
    except ValueError as error:
        raise SpecError(f"reference {file}: expected a JSON object of names and scores ({error})") from error
    if not isinstance(read, dict):
        raise SpecError(f"reference {file}: expected a JSON object of names and scores, got {read!r:.80}")
    return read
