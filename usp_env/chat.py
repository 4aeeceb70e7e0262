"""`usp-env chat`: a person takes either seat of the environment.

The conversation is on disk after every utterance (`chat.json`: the last whole turn, and what the person said since), so that
Ctrl-C, a closed terminal or a crash lose nothing: `usp-env chat --out DIR --resume` goes on. When it has ended it is an
episode like any other, in `transcripts.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from usp_env.dialogue import Role, other
from usp_env.driver import Conductor
from usp_env.episode import Episode
from usp_env.errors import RunDirectoryError, SpecError, UspError, require
from usp_env.ledger import FILE as LEDGER
from usp_env.records import Reply
from usp_env.rollout import take
from usp_env.transcripts import FILE, RUN, RunDirectory, check_free, read_config
from usp_env.users.human import HumanSpeaker, LeftError

DRAFT = "chat.json"
_SETTINGS = ("seat", "user", "assistant", "bank", "split", "population", "profile", "turns", "reward", "seed")


def chat(arguments: argparse.Namespace) -> int:
    """Talk until the conversation ends or the person leaves; returns the exit status."""
    if arguments.resume and not arguments.out:
        raise SpecError("--resume goes on with a saved conversation: name its directory with --out DIR")
    folder = Path(arguments.out or time.strftime("runs/chat-%Y%m%d-%H%M%S"))
    check_free(folder, arguments.resume, arguments.overwrite)
    if arguments.resume:
        if not (folder / DRAFT).is_file():
            raise _ended(folder)
        saved = read_config(folder)
        for name in _SETTINGS:
            setattr(arguments, name, saved.get(name, getattr(arguments, name)))
    console = require("rich.console", "report").Console(highlight=False, emoji=False, markup=False)
    screen = _Screen(console)
    conductor = _table(arguments)
    config = {"command": "chat", **{name: getattr(arguments, name) for name in _SETTINGS}}
    conductor.record = RunDirectory(folder, config, arguments.resume, arguments.overwrite, conductor.provenance())
    if arguments.overwrite:
        (folder / DRAFT).unlink(missing_ok=True)
    person: Role = conductor.rules.agent_role
    conductor.record.models = {person: "human", other(person): conductor.partner.spec}
    episode, said = _load(folder) if arguments.resume else (_begin(conductor, arguments), None)
    if arguments.resume:
        if episode.id in conductor.record.finished:  # killed after its line was written
            (folder / DRAFT).unlink()
            raise _ended(folder)
        screen.history(episode, said)
    speaker = HumanSpeaker(person, show=screen.show, max_chars=conductor.rules.max_chars)
    try:
        _talk(episode, said, conductor, speaker, screen, folder)
    except (LeftError, KeyboardInterrupt):
        screen.show("note", _saved(folder))
        return 0
    except _FailedError as error:
        screen.show("note", f"The model failed: {error}. {_saved(folder)}")
        return 1
    (folder / DRAFT).unlink()
    screen.end(episode)
    screen.show("note", f"Written: {folder} (usp-env show {folder} --episode {episode.id})")
    return 0


class _FailedError(UspError):
    """A call failed; the conversation can go on from what is saved."""


def _ended(folder: Path) -> RunDirectoryError:
    return RunDirectoryError(f"{str(folder)!r} holds no conversation to go on with: it has ended; begin another")


def _saved(folder: Path) -> str:
    if (folder / DRAFT).is_file():
        return f"Saved. Go on with: usp-env chat --out {folder} --resume"
    for name in (RUN, FILE, LEDGER):  # the directory can be used again
        (folder / name).unlink(missing_ok=True)
    return "Nothing was said yet, so nothing is saved."


def _table(arguments: argparse.Namespace) -> Conductor:
    from usp_env import assistants, users
    from usp_env.env import make_conductor
    from usp_env.rewards.base import make_reward
    from usp_env.sampling import load_sampler

    seat = arguments.seat
    reward = make_reward(None if arguments.reward in ("none", "None", "") else arguments.reward, seat)
    sampler = load_sampler(arguments.bank, None if arguments.split == "all" else arguments.split)
    partner = users.load(arguments.user) if seat == "assistant" else assistants.load(arguments.assistant)
    if isinstance(partner, HumanSpeaker):
        raise SpecError("a person takes one seat; name a model for the other")
    return make_conductor(partner, sampler, reward, seat, population=arguments.population, max_turns=arguments.turns)


def _begin(conductor: Conductor, arguments: argparse.Namespace) -> Episode:
    options = {"profile_id": arguments.profile} if arguments.profile else None
    return conductor.new_episode(np.random.default_rng(arguments.seed), options)


def _talk(
    episode: Episode, said: Reply | None, conductor: Conductor, person: HumanSpeaker, screen: _Screen, folder: Path
) -> None:
    """Take turns; every utterance is on disk before the next one is awaited."""
    while not episode.done:
        if episode.pending is not None:
            with screen.waiting(other(person.role)):
                conductor.run([episode])
            continue
        if said is None:
            _save(folder, episode, None)
            view = episode.dialogue().view_for(person.role, episode.profile)
            said = person.respond([view], [0])[0]
            _save(folder, episode, said)
        take(episode, said)
        said = None
    conductor.run([episode])
    if episode.outcome == "infra_failure" and (folder / DRAFT).is_file():
        raise _FailedError(str(episode.error))
    if not episode.messages:
        raise UspError(f"the {other(person.role)} could not begin: {episode.error or episode.end_reason}; try another --seed")
    conductor.close([episode])


def _save(folder: Path, episode: Episode, said: Reply | None) -> None:
    record = {"episode": episode.snapshot(), "said": said and {"text": said.text, "ended": said.ended}}
    fresh = folder / f"{DRAFT}.new"
    fresh.write_text(json.dumps(record), "utf-8")
    fresh.replace(folder / DRAFT)


def _load(folder: Path) -> tuple[Episode, Reply | None]:
    try:
        record = json.loads((folder / DRAFT).read_text("utf-8"))
        said = record["said"] and Reply(str(record["said"]["text"]), bool(record["said"]["ended"]))
        return Episode.restore(record["episode"]), said
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunDirectoryError(f"{folder / DRAFT}: expected a saved conversation, it is damaged ({error!r})") from error


class _Screen:
    """What the person sees."""

    def __init__(self, console: Any) -> None:
        self.console, self.last = console, ""

    def show(self, who: str, text: str) -> None:
        """Print an utterance."""
        from usp_env.report.terminal import STYLES
        from usp_env.report.terminal import text as safe

        if who != "note":  # a note in between does not make the partner's last words unseen
            self.last = text
        style = STYLES.get(who, "dim" if who == "note" else "bold yellow")
        self.console.print(safe((text, style)) if who == "note" else safe((f"{who}> ", style), text))

    def waiting(self, who: str) -> Any:
        return self.console.status(f"the {who} is writing")

    def history(self, episode: Episode, said: Reply | None) -> None:
        """What was said so far; but for the last utterance, where the person is shown that when asked."""
        for message in episode.messages if said else episode.messages[:-1]:
            self.show(message.role, message.content)
        if said:
            self.show(episode.rules.agent_role, said.text)

    def end(self, episode: Episode) -> None:
        """Print what the partner said last, how the conversation ended, whom one talked with, and the reward."""
        last = episode.messages[-1]
        if last.role != episode.rules.agent_role and last.content != self.last:
            self.show(last.role, last.content)
        self.show("note", f"The conversation is over: {episode.end_reason}" + (f" ({episode.error})" if episode.error else ""))
        if episode.rules.agent_role == "assistant":
            self.show("you talked with", str(episode.profile))
        if episode.reward_terms:
            self.show("reward", ", ".join(f"{name} {value:.3f}" for name, value in episode.reward_terms.items()))
