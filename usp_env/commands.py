"""What the commands do; `usp_env.cli` parses them."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from usp_env import backends, commands_benchmark, commands_evaluate, commands_profiles
from usp_env.backends.base import Backend
from usp_env.backends.spec import ModelSpec
from usp_env.chat import chat
from usp_env.console import say
from usp_env.driver import Conductor
from usp_env.episode import Episode
from usp_env.errors import SpecError, UnknownNameError, UspError, require
from usp_env.profiles import Profile, ProfileBank
from usp_env.records import RewardTerms
from usp_env.transcripts import RUN, RunDirectory, Transcript, check_free, read_config, read_transcripts, transcribe

PLAY: Mapping[str, Any] = {
    "user": "usp-mini",
    "assistant": "smollm2-135m",
    "turns": 10,
    "reward": "goal",
    "bank": "sharegpt",
    "split": "train",
}
"""Defaults of `usp-env play`."""


def run(arguments: argparse.Namespace) -> int:
    """Dispatch; returns the exit status."""
    name = f"{arguments.command}_{arguments.kind}" if arguments.command == "profiles" else arguments.command
    handlers: dict[str, Callable[[argparse.Namespace], int]] = {
        "fetch": fetch,
        "play": play,
        "chat": chat,
        "show": show,
        "score": score,
        "profiles_extract": commands_profiles.extract,
        "profiles_show": commands_profiles.show,
        "profiles_sample": commands_profiles.sample,
        "profiles_plot": commands_profiles.plot,
        "check": check,
        "evaluate": commands_evaluate.evaluate,
        "benchmark": commands_benchmark.benchmark,
        "report": report,
    }
    return handlers[name](arguments)


# ── fetch ────────────────────────────────────────────────────────────────────────────────────────


def fetch(arguments: argparse.Namespace) -> int:
    """`usp-env fetch`."""
    from usp_env.models import assets

    if arguments.list:
        for asset in assets.ASSETS.values():
            say(f"{'✓' if assets.available(asset.name) else '·'} {asset.name:17} {asset.description} (licence: {asset.license})")
        return 0
    found = assets.fetch(arguments.names or None, source=arguments.source, report=say, force=arguments.force)
    for name, path in found.items():
        say(f"{name}: {path}")
    return 0


# ── play ─────────────────────────────────────────────────────────────────────────────────────────


def play(arguments: argparse.Namespace) -> int:
    """`usp-env play`."""
    if (arguments.resume or arguments.overwrite) and not arguments.out:
        raise SpecError("--resume and --overwrite are about a run directory: name it with --out DIR")
    if arguments.replay:
        return _replay(arguments)
    _fill(arguments, {})
    if arguments.episode or arguments.from_turn:
        raise SpecError("--episode and --from-turn go on from a recorded run: name it with --replay RUN")
    from usp_env.rollout import plan

    if arguments.out:
        check_free(arguments.out, arguments.resume, arguments.overwrite)
    conductor, agent = _stage(arguments)
    specs = plan(
        conductor.sampler, _populations(arguments.population, conductor.sampler.populations), arguments.episodes, arguments.seed
    )
    if arguments.out:
        config = {
            "user": conductor.partner.spec,
            "assistant": agent.spec,
            **{k: getattr(arguments, k) for k in ("bank", "split", "population", "turns", "reward", "seed")},
        }
        record = conductor.record = RunDirectory(
            arguments.out, config, arguments.resume, arguments.overwrite, conductor.provenance(agent)
        )
        known = [spec for spec in specs if f"{spec.episode_seed:014x}" in record.finished]
        if known:
            say(f"{len(known)} of {len(specs)} episodes are finished already")
        specs = [spec for spec in specs if spec not in known]
    finished = _roll(arguments, conductor, agent, specs, len(specs))
    if arguments.out and conductor.record is not None:
        for role, account in sorted(conductor.record.ledger.accounts.items()):
            say(f"{role}: {account}")
        say(f"written: {arguments.out} (usp-env report {arguments.out} makes the page)")
    if finished and all(episode.outcome == "infra_failure" for episode in finished):
        say(f"every episode failed, the first with: {finished[0].error}")
        return 1
    return 0


def _stage(arguments: argparse.Namespace) -> tuple[Conductor, Any]:
    """The environment's parts, and the agent in the assistant's seat."""
    from usp_env import assistants, users
    from usp_env.env import make_conductor
    from usp_env.rewards.base import make_reward
    from usp_env.sampling import load_sampler

    source = _source(arguments)
    reward = None if arguments.reward in ("none", "None", "") else arguments.reward
    scorer = make_reward(reward, "assistant")  # first: a mistake here should not cost loading two models
    agent = assistants.load(arguments.assistant, source)
    if "human" in (arguments.user, arguments.assistant):
        raise SpecError("play shows many conversations at a time; a person talks in usp-env chat --as assistant (or user)")
    sampler = load_sampler(arguments.bank, None if arguments.split == "all" else arguments.split)
    return make_conductor(users.load(arguments.user, source), sampler, scorer, "assistant", max_turns=arguments.turns), agent


def _source(arguments: argparse.Namespace) -> Callable[[ModelSpec], Backend]:
    if not arguments.cache:
        return backends.load
    return lambda spec: backends.load_cached(spec, arguments.cache, arguments.cache_mode)


def _populations(text: str, known: Sequence[str]) -> list[str]:
    if text == "all":
        return list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UnknownNameError("population", name, [*known, "all"])
    if not names:
        raise SpecError(f"--population: expected names such as {', '.join(known)} or all, got {text!r}")
    return names


def _roll(arguments: argparse.Namespace, conductor: Conductor, agent: Any, episodes: Sequence[Any], total: int) -> list[Episode]:
    from usp_env.report.terminal import LiveTranscript, summary_table
    from usp_env.rollout import roll

    console = require("rich.console", "report").Console()
    models = {conductor.partner.role: conductor.partner.spec, agent.role: agent.spec}
    if conductor.record is not None:
        conductor.record.models = models
    with LiveTranscript(total, console, quiet=arguments.quiet) as live:

        def watch(moved: Sequence[Episode]) -> None:
            for episode in moved:
                live.update(episode)

        finished = roll(conductor, agent, episodes, arguments.lanes, watch)
    console.print(summary_table([transcribe(episode, models).to_json() for episode in finished]))
    return finished


def _replay(arguments: argparse.Namespace) -> int:
    from usp_env.replay import go_on, replay
    from usp_env.report.terminal import print_episode, summary_table

    if arguments.resume:
        raise SpecError("--resume finishes a run of `play`; a replay has nothing to resume: leave it out")
    if arguments.out and not arguments.from_turn:
        raise SpecError("--out: a plain replay writes nothing; leave it out, or go on live with --episode ID --from-turn K")
    transcripts = _chosen(read_transcripts(arguments.replay), arguments.episode)
    console = require("rich.console", "report").Console()
    if arguments.from_turn is None:
        for transcript in transcripts:
            replay(transcript)
            if not arguments.quiet:
                print_episode(transcript.to_json(), console)
        console.print(summary_table([transcript.to_json() for transcript in transcripts]))
        say(f"{len(transcripts)} episodes rerun: every one ends as recorded")
        return 0
    if arguments.episode is None:
        raise SpecError("--from-turn goes on from one episode: name it with --episode ID")
    if arguments.out:
        check_free(arguments.out, overwrite=arguments.overwrite)
    _fill(arguments, _recorded(transcripts[0], Path(arguments.replay)))
    conductor, agent = _stage(arguments)
    profile = _profile(transcripts[0], conductor.sampler.bank)
    episode = go_on(transcripts[0], arguments.from_turn, conductor.rules, profile)
    if arguments.out:
        config = {"from": transcripts[0].episode_id, "turn": arguments.from_turn}
        conductor.record = RunDirectory(arguments.out, config, overwrite=arguments.overwrite)
    _roll(arguments, conductor, agent, [episode], 1)
    return 0


def _fill(arguments: argparse.Namespace, recorded: Mapping[str, Any]) -> None:
    """What the command line leaves open: the record's, else the default."""
    for name, default in PLAY.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, recorded.get(name, default))


def _recorded(transcript: Transcript, path: Path) -> dict[str, Any]:
    """How a recorded episode was set up, as far as its run tells."""
    folder = path if path.is_dir() else path.parent
    run = read_config(folder) if (folder / RUN).is_file() else {}
    known = {name: run[name] for name in ("bank", "split", "reward") if run.get(name) is not None}
    speakers = {role: spec for role, spec in transcript.models.items() if spec not in ("agent", "human")}
    return {**known, **speakers, "turns": transcript.rules.get("max_turns", PLAY["turns"])}


def _chosen(transcripts: list[Transcript], episode_id: str | None) -> list[Transcript]:
    if episode_id is None:
        return transcripts
    chosen = [t for t in transcripts if t.episode_id == episode_id]
    if not chosen:
        raise UnknownNameError("episode", episode_id, [t.episode_id for t in transcripts])
    return chosen


# ── show, score, report ──────────────────────────────────────────────────────────────────────────


def show(arguments: argparse.Namespace) -> int:
    """`usp-env show`."""
    from usp_env.report.terminal import print_episode, summary_table

    transcripts = _chosen(read_transcripts(arguments.run, torn="skip"), arguments.episode)
    console = require("rich.console", "report").Console()
    if arguments.episode is None:
        for t in transcripts:
            ends = f"{t.end_reason:14} {t.outcome:12} {sum(t.rewards):+.3f}"
            say(f"{t.episode_id}  {t.population:9} {len(t.rewards):2} steps  {ends}")
        console.print(summary_table([t.to_json() for t in transcripts]))
        return 0
    for t in transcripts:
        print_episode(t.to_json(), console, turn=arguments.turn, prompts=arguments.prompts)
    return 0


def score(arguments: argparse.Namespace) -> int:
    """`usp-env score`."""
    from usp_env.report.facts import spread
    from usp_env.rewards.base import make_reward

    transcripts = read_transcripts(arguments.run, torn="skip")
    if not transcripts:
        raise UspError(f"{arguments.run}: no finished episode to score")
    if arguments.out and Path(arguments.out).exists():
        raise SpecError(f"--out {arguments.out}: the file exists; name another")
    bank = ProfileBank.load(arguments.bank)
    rows: list[tuple[Transcript, RewardTerms | None]] = []
    for seat in ("assistant", "user"):
        chosen = [t for t in transcripts if t.agent_role == seat]
        if chosen and (reward := make_reward(arguments.reward, seat)) is not None:  # type: ignore[arg-type]
            rows += zip(chosen, reward([_profile(t, bank) for t in chosen], [t.dialogue() for t in chosen]), strict=True)
    for t, terms in rows:
        flat = " ".join(f"{name}={value:.3f}" for name, value in terms.flat.items()) if terms else ""
        say(f"{t.episode_id}  {t.population:9} {f'{terms.value:.3f}' if terms else 'not scorable'}  {flat}")
    values = [terms.value for _, terms in rows if terms]
    mean, deviation = spread(values)  # as in the viewers
    told = "no value" if mean is None else f"mean {mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f} (sd)")
    say(f"{arguments.reward}: {told}, {len(values)} of {len(rows)} scored")
    if arguments.out:
        records = [{"episode_id": t.episode_id, "value": x and x.value, "terms": x and x.flat} for t, x in rows]
        Path(arguments.out).write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return 0


def _profile(transcript: Transcript, bank: ProfileBank) -> Profile:
    try:
        return bank.get(transcript.profile_id)  # with its attributes
    except UnknownNameError:
        prose = transcript.profile
        return Profile(transcript.profile_id, prose.get("objective", ""), prose.get("subjective", ""))


def report(arguments: argparse.Namespace) -> int:
    """`usp-env report`."""
    from usp_env.report.board import find_board, write_board_page
    from usp_env.report.card import find_card, write_card_page
    from usp_env.report.html import write_report

    path = Path(arguments.run)
    write = write_board_page if find_board(path) else write_card_page if find_card(path) else write_report
    say(str(write(path, *([Path(arguments.out)] if arguments.out else []))))
    return 0


# ── check ────────────────────────────────────────────────────────────────────────────────────────


def check(arguments: argparse.Namespace) -> int:
    """`usp-env check`."""
    import gymnasium as gym
    from gymnasium.utils.env_checker import check_env

    seats = {"assistant": {"user": arguments.user}, "user": {"assistant": arguments.assistant}}
    for seat, partner in seats.items():
        if arguments.seat not in (seat, "both"):
            continue
        env = gym.make(f"usp_env/{seat.capitalize()}-v0", reward=None, max_turns=3, **partner)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env.unwrapped, skip_render_check=True)
        say(f"{seat} seat: check_env passed ({', '.join(partner.values())})")
        first, second = (_short_talk(env) for _ in range(2))
        if first != second:
            raise UspError(f"{seat} seat: two runs with one seed differ:\n{first}\n{second}")
        say(f"{seat} seat: same seed, same transcript ({len(first)} messages)")
    return 0


def _short_talk(env: Any) -> list[dict[str, str]]:
    observation, info = env.reset(seed=0)
    for text in ("Could you tell me more?", "Here is what I think.", "Anything else?"):
        observation, _, terminated, truncated, info = env.step(text)
        if terminated or truncated:
            break
    return list(info["messages"])
