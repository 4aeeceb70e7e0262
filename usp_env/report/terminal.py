"""Transcripts in a terminal: one episode in full, a live view of many, a summary table.

Model text is printed as `rich.text.Text` (no markup, no emoji codes) after `visible` (no escape sequences), so that
a transcript cannot drive the terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from usp_env.dialogue import visible
from usp_env.episode import Episode
from usp_env.errors import SpecError, require
from usp_env.report import facts
from usp_env.report.facts import Utterance, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

STYLES = {"user": "bold cyan", "assistant": "bold green", "system": "bold yellow"}
LANES = 8  # conversations that the live view shows at a time


def text(*parts: object | tuple[object, str]) -> Text:
    """A `rich.text.Text` of safe pieces, each a value or a (value, style) pair."""
    made: Text = require("rich.text", "report").Text()
    for part in parts:
        value, style = part if isinstance(part, tuple) else (part, "")
        made.append(visible(value), style=style)
    return made


# ── one episode ──────────────────────────────────────────────────────────────────────────────────


def print_episode(transcript: Mapping[str, Any], console: Console, turn: int | None = None, prompts: bool = False) -> None:
    """Print what each side received and said, ids, seeds, raw output, finish reasons, usage and rewards.

    Args:
        transcript: One object of `transcripts.jsonl`.
        console: Where to.
        turn: Only this user utterance and the answer to it; from 1 on.
        prompts: Also the messages that each speaker was given.

    Raises:
        SpecError: There is no such turn.
    """
    said, silent = facts.utterances(transcript)
    last = facts.turns(transcript)
    if turn is not None and not 1 <= turn <= last:
        raise SpecError(f"episode {transcript['episode_id']}: expected a turn from 1 to {last}, got {turn}")
    console.rule(text((f"episode {transcript['episode_id']}", "bold")))
    _print_facts(transcript, console)
    for utterance in said:
        if turn in (None, utterance.turn):
            _print_utterance(transcript, utterance, console, prompts)
    if turn in (None, last):
        _print_end(transcript, silent, console)


def _print_facts(transcript: Mapping[str, Any], console: Console) -> None:
    rows = {
        "seed": transcript["episode_seed"],
        "profile": f"{transcript['profile_id']} ({transcript['population']})",
        "agent": f"in the {transcript['agent_role']}'s seat",
        **transcript["models"],
    }
    for key, value in rows.items():
        console.print(text((f"{key:10} ", "dim"), value))
    for key, value in transcript["profile"].items():
        console.print(text("\n", (key, "dim"), "\n", value))


def _print_utterance(transcript: Mapping[str, Any], utterance: Utterance, console: Console, prompts: bool) -> None:
    message, role = utterance.message, utterance.role
    notes = [f"turn {utterance.turn}", f"seed {facts.seed_of(transcript, utterance.index)}"]
    if message.get("finish_reason"):
        notes.append(f"finish {message['finish_reason']}")
    notes += [f"{count} {key}" for key, count in (message.get("usage") or {}).items()]
    if utterance.reward is not None:
        notes.append(f"reward {number(utterance.reward)}")
    console.print(
        text("\n", (role, STYLES[role]), (" · agent" if utterance.agent else "", STYLES[role]), ("  " + ", ".join(notes), "dim"))
    )
    if prompts:
        for given in facts.received(transcript, utterance.index):
            console.print(_padded((f"received {given['role']}\n", STYLES.get(given["role"], "dim")), (given["content"], "dim")))
    console.print(text(message["content"]))
    raw = message.get("raw")
    if raw is not None and raw != message["content"]:
        console.print(_padded(("raw\n", "magenta"), repr(raw)))


def _padded(*parts: object | tuple[object, str]) -> Any:
    return require("rich.padding", "report").Padding(text(*parts), (0, 0, 0, 4))


def _print_end(transcript: Mapping[str, Any], silent: Sequence[float], console: Console) -> None:
    flag = "terminated" if transcript["terminated"] else "truncated"
    validity = ("valid", "green") if transcript["valid"] else ("invalid", "bold red")
    console.print(text("\n", (transcript["end_reason"], "bold"), f" ({flag}), {transcript['outcome']}, ", validity))
    for label, key in (("not taken into the dialogue: ", "rejected"), ("error: ", "error")):
        if transcript.get(key) is not None:
            console.print(text((label, "red"), transcript[key] or "(empty)"))
    rewards = [number(reward) for reward in transcript["rewards"]]
    console.print(
        text(
            ("rewards    ", "dim"),
            ", ".join(rewards) or "none",
            f" = {number(float(sum(transcript['rewards'])))}" if rewards else "",
        )
    )
    if silent:
        console.print(text(("           ", "dim"), "the last step left no utterance"))
    if transcript["utterance_rewards"] != transcript["rewards"]:
        console.print(
            text(("by utter.  ", "dim"), ", ".join(number(reward) for reward in transcript["utterance_rewards"]) or "none")
        )
    for name, value in transcript["reward_terms"].items():
        console.print(text((f"{name:10} ", "dim"), number(value)))
    for role, counts in transcript["usage"].items():
        if counts:
            console.print(text((f"{role:10} ", "dim"), ", ".join(f"{count} {key}" for key, count in counts.items())))


# ── many ─────────────────────────────────────────────────────────────────────────────────────────


def summary_table(transcripts: Sequence[Mapping[str, Any]]) -> Table:
    """One row a population and one for all: episodes, valid ones, mean turns, mean return ± sample sd, how they ended."""
    total, rows = facts.group("all", transcripts), facts.groups(transcripts)
    caption = text(
        f"outcomes: {_counts(total.outcomes) or 'none'}\nturns and returns are of valid episodes: mean ± sample sd, n returns"
    )
    table: Table = require("rich.table", "report").Table(
        box=require("rich.box", "report").SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False
    )
    for name in ("population", "episodes", "valid", "turns", "return", "n", "ended by"):
        table.add_column(name, justify="left" if name in ("population", "ended by") else "right", no_wrap=name == "return")
    for index, g in enumerate([*rows, total] if len(rows) != 1 else rows):
        turns = "–" if g.turns is None else f"{g.turns:.1f}"
        cells = (g.name, g.episodes, g.valid, turns, g.returns, g.n, _counts(g.ends))
        table.add_row(*map(text, cells), end_section=index == len(rows) - 1)
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


class LiveTranscript:
    """Shows conversations while they are rolled.

    In a terminal: the newest utterance of each running conversation over a progress bar; a finished one scrolls by
    in full. Elsewhere: one plain line an utterance, which begins with the episode's id.

    Args:
        total: Episodes to come.
        console: Where to; default standard output.
        quiet: Show nothing.

    Example:
        >>> from rich.console import Console
        >>> with LiveTranscript(2, Console(), quiet=True) as live:
        ...     roll(conductor, agent, specs, watch=lambda moved: [live.update(e) for e in moved])  # doctest: +SKIP
    """

    def __init__(self, total: int, console: Console | None = None, quiet: bool = False) -> None:
        self.console: Console = console if console is not None else require("rich.console", "report").Console()
        self.total, self.quiet = total, quiet
        self.populations: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self._seen: dict[str, int] = {}
        self._lanes: dict[str, Text] = {}
        self._live: Any = None
        self._progress: Any = None

    def __enter__(self) -> LiveTranscript:
        if self.console.is_interactive and not self.quiet:
            progress = require("rich.progress", "report")
            columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
            self._progress = progress.Progress(*columns, console=self.console)
            self._progress.add_task("episodes", total=self.total)
            self._live = require("rich.live", "report").Live(
                self._view(), console=self.console, refresh_per_second=8, transient=True
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, episode: Episode) -> None:
        """Show what is new in an episode; each of its ends is counted once."""
        shown = self._seen.get(episode.id, 0)
        if shown < 0:  # has ended before
            return
        self._seen[episode.id] = -1 if episode.done else len(episode.messages)
        if episode.done:
            self.populations[episode.spec.population] += 1
            self.outcomes[str(episode.outcome)] += 1
        if self.quiet:
            return
        if self._live is None:
            self._print_lines(episode, shown)
        else:
            self._refresh(episode)

    def _print_lines(self, episode: Episode, shown: int) -> None:
        head = f"{episode.id} {episode.spec.population:9}"
        for message in episode.messages[shown:]:
            self.console.print(text(f"{head} {message.role:9} ", " ".join(message.content.split())), soft_wrap=True)
        if episode.done:
            done = f"{sum(self.outcomes.values())}/{self.total}"
            self.console.print(text(f"{head} {'end':9} ", _ending(episode), f", {done} episodes"), soft_wrap=True)

    def _refresh(self, episode: Episode) -> None:
        if episode.done:
            self._lanes.pop(episode.id, None)
            self._progress.advance(self._progress.task_ids[0])
            self.console.rule(text((episode.id, "bold"), f" {episode.spec.population}"))
            for message in episode.messages:
                self.console.print(text((f"{message.role}: ", STYLES[message.role]), message.content))
            self.console.print(text((_ending(episode), "dim" if episode.valid else "bold red")))
        elif episode.messages:
            newest = episode.messages[-1]
            line = text(
                (f"{episode.id} {episode.turn:2} ", "dim"),
                (f"{newest.role}: ", STYLES[newest.role]),
                " ".join(newest.content.split()),
            )
            line.no_wrap, line.overflow = True, "ellipsis"
            self._lanes[episode.id] = line
        self._live.update(self._view())

    def _view(self) -> Any:
        lanes = list(self._lanes.values())
        hidden = [text((f"… and {len(lanes) - LANES} more", "dim"))] if len(lanes) > LANES else []
        counts = text((" │ ".join(_counts(c) for c in (self.populations, self.outcomes) if c), "dim"))
        return require("rich.console", "report").Group(*lanes[:LANES], *hidden, self._progress, counts)


def _ending(episode: Episode) -> str:
    """How it ended, in a line."""
    total = number(float(sum(episode.rewards))) if episode.rewards else "–"
    return f"{episode.end_reason}, {episode.outcome}, return {total}" + ("" if episode.valid else ", invalid")
