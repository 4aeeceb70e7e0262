"""Transcripts in a terminal."""

from __future__ import annotations

import io

import pytest
from test_facts import transcript

from usp_env.dialogue import END
from usp_env.episode import Episode
from usp_env.errors import SpecError
from usp_env.profiles import Profile
from usp_env.records import EpisodeSpec, Reply, Rules

pytest.importorskip("rich")

from rich.console import Console  # noqa: E402

from usp_env.report import terminal  # noqa: E402

EVIL = "[bold red]x[/] :smile: [link=http://a]b[/link] \x1b]0;owned\x07\x1b[2J\x9b31m \u202e {} <b> [/]"
SAFE = "[bold red]x[/] :smile: [link=http://a]b[/link] ␛]0;owned␇␛[2J\\x9b31m \\u202e {} <b> [/]"


def console(tty: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=200,
        force_terminal=tty,
        force_interactive=tty,
        color_system="truecolor" if tty else None,
        _environ={},
    )


def output(of: Console) -> str:
    return of.file.getvalue()  # type: ignore[attr-defined]


def test_a_hostile_transcript_cannot_drive_the_terminal() -> None:
    message = {"role": "user", "content": EVIL, "raw": EVIL + "!", "finish_reason": EVIL, "usage": {EVIL: 1}}
    texts = {key: EVIL for key in ("episode_id", "profile_id", "population", "end_reason", "outcome", "rejected", "error")}
    hostile = transcript(
        **texts,
        messages=[message] * 2,
        profile={EVIL: EVIL},
        models={"user": EVIL, "assistant": EVIL},
        reward_terms={EVIL: 0.0},
        usage={EVIL: {EVIL: 1}},
    )
    for tty in (False, True):
        shown = console(tty)
        terminal.print_episode(hostile, shown, prompts=True)
        shown.print(terminal.summary_table([hostile]))
        written = output(shown)
        for code in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e"):
            assert code not in written
        assert tty or "\x1b" not in written
        assert written.count("[bold red]x[/]") >= 15
        assert SAFE in written


def test_show_tells_everything() -> None:
    record = transcript(
        messages=[
            {
                "role": "user",
                "content": "hi",
                "raw": "<think>t</think>hi",
                "finish_reason": "stop",
                "usage": {"completion_tokens": 5},
            },
            {"role": "assistant", "content": "hello", "raw": None, "finish_reason": None, "usage": {}},
        ],
        rewards=[0.5, 0.0],
        utterance_rewards=[0.125],
        valid=False,
        outcome="infra_failure",
        error="server gone",
        usage={"user": {"completion_tokens": 5}, "assistant": {}},
    )
    shown = console()
    terminal.print_episode(record, shown, prompts=True)
    for part in (
        "episode 0001",
        "You cook.",
        "user  turn 1, seed ",
        "finish stop, 5 completion_tokens",
        "'<think>t</think>hi'",
        "received system",
        "Be kind.",
        "assistant · agent  turn 1, seed ",
        "reward +0.500",
        "turn_limit (truncated), infra_failure, invalid",
        "error: server gone",
        "+0.500, +0.000 = +0.500",
        "the last step left no utterance",
        "by utter.  +0.125",
        "goal       +0.750",
    ):
        assert part in output(shown)


def test_one_turn() -> None:
    shown = console()
    terminal.print_episode(transcript(), shown, turn=1)
    assert "assistant 0" in output(shown)
    assert "assistant 1" not in output(shown)
    assert "received" not in output(shown)
    with pytest.raises(SpecError, match="a turn from 1 to 2, got 3"):
        terminal.print_episode(transcript(), shown, turn=3)


def test_the_table_by_hand() -> None:
    shown = console()
    shown.print(
        terminal.summary_table(
            [transcript(rewards=[1.0]), transcript(rewards=[0.0], population="virtual"), transcript(rewards=[2.0])]
        )
    )
    rows = [line.split() for line in output(shown).split("\n")]
    assert ["density", "2", "2", "2.0", "+1.500", "±", "0.707", "2", "turn_limit", "2"] in rows
    assert ["virtual", "1", "1", "2.0", "+0.000", "1", "turn_limit", "1"] in rows
    assert ["all", "3", "3", "2.0", "+1.000", "±", "1.000", "3", "turn_limit", "3"] in rows
    terminal.summary_table([])


def episode(seed: int, population: str) -> Episode:
    begun = Episode(EpisodeSpec("p0", population, seed), Profile("p0", "You.", "You."), Rules())
    begun.begin()
    begun.feed(Reply(f"hi\n{EVIL}"))
    return begun


def test_live_lines_without_a_terminal() -> None:
    shown = console()
    first, second = episode(1, "density"), episode(2, "virtual")
    with terminal.LiveTranscript(2, shown) as live:
        live.update(first)
        live.update(second)
        live.update(first)
        first.act("hello there")
        first.feed(Reply("", ended=True))
        live.update(first)
        live.update(first)
    lines = output(shown).split("\n")[:-1]
    assert lines == [
        f"{1:014x} density   user      hi {SAFE}",
        f"{2:014x} virtual   user      hi {SAFE}",
        f"{1:014x} density   assistant hello there",
        f"{1:014x} density   end       user_ended, completed, return +0.000, 1/2 episodes",
    ]
    assert (live.populations, live.outcomes) == ({"density": 1}, {"completed": 1})


def test_live_view_in_a_terminal() -> None:
    shown = console(tty=True)
    many = [episode(seed, "density") for seed in range(12)]
    with terminal.LiveTranscript(12, shown) as live:
        for one in many:
            live.update(one)
        assert "… and 4 more" in str([getattr(part, "plain", part) for part in live._view().renderables])
        many[0].act("")  # the agent fails
        live.update(many[0])
        assert "density 1 │ agent_failure 1" in str([getattr(part, "plain", part) for part in live._view().renderables])
    written = output(shown)
    assert "1/12" in written
    assert "bad_action, agent_failure" in written
    assert "\x07" not in written
    assert "\x1b[2J" not in written


def test_quiet_and_interrupted() -> None:
    shown = console(tty=True)
    with terminal.LiveTranscript(1, shown, quiet=True) as live:
        live.update(episode(1, "density"))
    assert output(shown) == ""
    live = terminal.LiveTranscript(1, shown)

    def interrupt() -> None:
        with live:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert live._live is None  # the cursor is back


def test_the_end_marker_is_only_text() -> None:
    shown = console()
    terminal.print_episode(transcript(messages=[{"role": "user", "content": f"say {END}"}]), shown)
    assert f"say {END}" in output(shown)
