"""The anchors and the ladder, with scripted users and a reward that counts right answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import Speaker

from usp_env import commands_benchmark, users
from usp_env.assistants import REFUSAL
from usp_env.dialogue import Dialogue, View
from usp_env.errors import MissingAssetError, UnknownNameError, UspError
from usp_env.evaluation.benchmark import benchmark
from usp_env.evaluation.protocol import Protocol
from usp_env.evaluation.validity import LADDER, RealReplies, anchor, conversations, donors, essay, ladder, spam
from usp_env.profiles import Profile, ProfileBank
from usp_env.records import EpisodeSpec, generation_seed
from usp_env.rewards.base import register_reward
from usp_env.sampling.base import UniformSampler

THINGS = ("rye", "oak", "tin", "jazz", "soup", "chess", "kelp", "ivy")


def somebody(i: int, conversation: bool = True) -> Profile:
    """Wants to know two things, and was told them once."""
    wants = [f"Ask how to get {THINGS[i]}", f"Ask why {THINGS[i]} costs much"]
    talk = [
        {"role": "user", "content": f"how do i get {THINGS[i]}"},
        {"role": "assistant", "content": f"You get {THINGS[i]} at the market."},
        {"role": "user", "content": f"why does {THINGS[i]} cost much"},
        {"role": "assistant", "content": f"Since {THINGS[i]} is rare."},
    ]
    facts: dict[str, Any] = {"objective_facts": {"scenarios": [{"goals_or_plans": "g", "task_details": wants}]}}
    if conversation:
        facts["conversation"] = talk
    return Profile(f"p{i}", f"You want {THINGS[i]}.", "You are brief.", facts)


BANK = ProfileBank([somebody(i) for i in range(len(THINGS))], "things")
PROTOCOL = Protocol(populations=("uniform",), n=8, turns=4, seeds=(0, 1))


def right(profile: Profile, dialogue: Dialogue) -> float:
    """Share of the two right answers that were given."""
    said = " ".join(dialogue.utterances("assistant"))
    return float(np.mean(["at the market" in said, "is rare" in said]))


def test_the_ladder_is_ranked_by_users_who_ask(tmp_path: Path) -> None:
    for user in (users.load("agenda"), users.load("scripted"), users.ReplaySpeaker(BANK)):
        out = tmp_path / user.spec
        board = benchmark(LADDER, out, PROTOCOL, user=user, sampler=UniformSampler(BANK), reward=right)
        report = ladder(board)
        assert report.ordered, user.spec
        assert [at.mean for at in report.averages.values()] == sorted((at.mean for at in report.averages.values()), reverse=True)
        assert report.averages["ladder-bad"].mean == 0
    assert report.user == "replay"
    assert report.averages["ladder-good"].mean == 100
    assert report.certain
    assert list(report.steps) == ["ladder-good-ladder-mid", "ladder-mid-ladder-bad"]


def test_a_user_or_a_reward_that_ranks_otherwise_is_caught(tmp_path: Path) -> None:
    def upside_down(profile: Profile, dialogue: Dialogue) -> float:
        return 1 - right(profile, dialogue)

    sampler = UniformSampler(BANK)
    wrong = benchmark(LADDER, tmp_path / "a", PROTOCOL, user=users.load("agenda"), sampler=sampler, reward=lambda p, d: 0.5)
    assert not ladder(wrong).ordered
    assert not ladder(wrong).certain
    odd = benchmark(LADDER, tmp_path / "b", PROTOCOL, user=users.load("agenda"), sampler=sampler, reward=upside_down)
    assert not ladder(odd).ordered
    assert all(step.mean < 0 for step in ladder(odd).steps.values())
    few = benchmark(LADDER[:2], tmp_path / "c", PROTOCOL, user=users.load("agenda"), sampler=sampler, reward=right)
    with pytest.raises(UspError, match="ladder-bad"):
        ladder(few)


def test_the_spammer_says_the_words_of_what_this_user_wants(tmp_path: Path) -> None:
    assert spam(BANK[0]) == "ask how to get rye why costs much"
    heard: dict[str, set[str]] = {}

    def user(view: View, seed: int) -> str:
        if view.messages:
            heard.setdefault(view.profile.id, set()).add(view.messages[-1].content)
        return f"{view.profile.id} {seed}"

    benchmark(["spammer"], tmp_path / "b", PROTOCOL, user=Speaker(user), sampler=UniformSampler(BANK), reward=right)
    assert heard == {profile.id: {spam(profile)} for profile in BANK}


def test_the_essay_is_long_and_generic() -> None:
    assert len(essay().split()) == 2000
    assert len(essay()) < 16_000
    assert essay(3).split() == essay().split()[:3]
    speaker = anchor("essay", [], BANK, 1)
    assert speaker.respond([Dialogue().view_for("assistant")], [0])[0].text == essay()


def test_real_replies_come_from_the_own_conversation() -> None:
    real = RealReplies(conversations(BANK, ["p3", "virtual:p5+p1"]))

    def ask(profile_id: str, text: str) -> str:
        return real(BANK.get(profile_id), Dialogue.of([{"role": "user", "content": text}]).messages, 0)

    assert ask("p3", "but why is the cost so much") == "Since jazz is rare."
    assert ask("p3", "how can i get it?") == "You get jazz at the market."
    assert ask("virtual:p5+p1", "why does it cost much") == "Since chess is rare."
    assert ask("p0", "why") == REFUSAL  # not asked for when it was made
    assert donors("virtual:a+b+c") == ["a+b", "a"]
    assert donors("a") == ["a"]


def test_ladder_mid_answers_half_of_the_turns() -> None:
    episodes = [EpisodeSpec("p1", "uniform", seed) for seed in range(200)]
    good, mid, bad = (anchor(name, episodes, BANK, 3) for name in LADDER)
    view = Dialogue.of([{"role": "user", "content": "how do i get oak"}]).view_for("assistant")
    seeds = [generation_seed(e.episode_seed, "", turn, "assistant") for e in episodes for turn in (1, 2, 3)]
    answered = [reply.text for reply in mid.respond([view] * len(seeds), seeds)]
    assert {reply.text for reply in good.respond([view] * len(seeds), seeds)} == {"You get oak at the market."}
    assert {reply.text for reply in bad.respond([view] * 2, seeds[:2])} == {REFUSAL}
    assert set(answered) == {"You get oak at the market.", REFUSAL}
    assert answered.count(REFUSAL) / len(answered) == pytest.approx(0.5, abs=0.07)


def test_anchors_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="ladder-god"):
        anchor("ladder-god", [], BANK, 1)

    def nothing(source: str, **options: Any) -> Sequence[Any]:
        assert options["ids"] == {"p0"}
        return []

    monkeypatch.setattr("usp_env.data.conversations.load", nothing)
    bare = ProfileBank([somebody(0, conversation=False)], "bare")
    with pytest.raises(MissingAssetError, match="bare"):
        anchor("ladder-good", [EpisodeSpec("p0", "uniform", 1)], bare, 1)


def test_the_ladder_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    register_reward("right", right)
    monkeypatch.setattr("usp_env.evaluation.benchmark.load_sampler", lambda bank, split: UniformSampler(BANK))
    monkeypatch.setattr("usp_env.evaluation.benchmark.make_reward", _always_right())
    parser, run = argparse.ArgumentParser(), commands_benchmark._run
    commands_benchmark.add_options(parser)
    out = tmp_path / "ladder"
    line = ["--ladder", "--user", "agenda", "scripted", "--populations", "uniform", "--turns", "3", "--assistants", "echo"]
    arguments = parser.parse_args([*line, "--out", str(out)])
    assert commands_benchmark.benchmark(arguments) == 0
    told = json.loads((out / "ladder.json").read_text("utf-8"))
    assert [(report["user"], report["ordered"]) for report in told] == [("agenda", True), ("scripted", True)]
    assert (out / "agenda" / "leaderboard.md").is_file()
    assert "agenda: ladder-good" in capsys.readouterr().out
    again = parser.parse_args([*line, "--out", str(out), "--resume"])
    assert commands_benchmark.benchmark(again) == 0
    overwrite = parser.parse_args([*line, "--out", str(out), "--overwrite"])
    monkeypatch.setattr("usp_env.commands_benchmark._run", _killed)
    with pytest.raises(KeyboardInterrupt):
        commands_benchmark.benchmark(overwrite)
    monkeypatch.setattr("usp_env.commands_benchmark._run", run)
    assert not (out / "ladder.json").exists()
    assert not (out / "scripted" / "run.json").exists()  # --resume must not take the old one for this ladder's
    with pytest.raises(UnknownNameError, match="agneda"):
        commands_benchmark.benchmark(parser.parse_args(["--ladder", "--user", "agenda", "agneda", "--out", str(tmp_path / "no")]))
    assert not (tmp_path / "no").exists()
    single = ["--user", "agenda", "--populations", "uniform", "--assistants", "echo", "known-bad", "--out", str(tmp_path / "b")]
    assert commands_benchmark.benchmark(parser.parse_args(single)) == 0
    assert "usp-bench-1+modified" in capsys.readouterr().out


def _killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


def _always_right() -> Any:
    from usp_env.rewards.base import make_reward

    return lambda reward, seat: make_reward("right", seat)
