"""Run directories, transcripts, replay, roll-outs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from doubles import Speaker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from usp_env import transcripts
from usp_env.dialogue import END
from usp_env.driver import Conductor
from usp_env.env import DialogueEnv, make_conductor
from usp_env.errors import BackendError, RunDirectoryError, SpecError, TranscriptError, UspError
from usp_env.profiles import Profile, ProfileBank
from usp_env.records import EpisodeSpec, Reply
from usp_env.replay import go_on, replay
from usp_env.rewards.base import make_reward
from usp_env.rollout import plan, roll
from usp_env.sampling.base import UniformSampler
from usp_env.transcripts import RunDirectory, read_transcripts, transcribe
from usp_env.wrappers import LastUtterance, RecordTranscripts

PROSE = ("a soup recipe please", "without onions", "how long does it keep?", "and in the freezer?", "what about bread with it")


def user(view: object, seed: int) -> Reply:
    """Every kind of ending, by person."""
    index, said = int(view.profile.id[1:]), sum(m.role == "user" for m in view.messages)
    endings = {
        0: Reply("", ended=True),
        1: Reply("bye then", ended=True),
        2: Reply("", error=BackendError("server gone")),
        3: Reply(""),
        4: Reply(("thanks!", "ok cheers mate", "I really appreciate it")[said % 3]),
    }
    if said == 0 or index == 5 or (index != 4 and said < 2):
        return Reply(f"{PROSE[said % 5]} {seed % 9973}")
    return endings[index]


def conductor(sampler: object, **settings: object) -> Conductor:
    return make_conductor(Speaker(user), sampler, None, population="uniform", max_turns=4, **settings)


def agent(view: object, seed: int) -> Reply:
    return Reply(f"<think>{seed}</think>answer {len(view.messages)} \u2028 🙂")


SPECS = [EpisodeSpec(f"p{i % 6}", "uniform", 100 + i) for i in range(12)]


def rolled(sampler: object, lanes: int = 4, speaker: object = agent) -> list[object]:
    return roll(conductor(sampler), Speaker(speaker, "assistant"), SPECS, lanes)


def test_roll_gives_the_same_episodes_for_any_number_of_lanes(sampler: object) -> None:
    by_lanes = [{e.id: transcribe(e, {}) for e in rolled(sampler, lanes)} for lanes in (1, 5, 64)]
    assert by_lanes[0] == by_lanes[1] == by_lanes[2]
    reasons = [by_lanes[0][f"{100 + i:014x}"].end_reason for i in range(6)]
    assert reasons == ["user_ended", "user_ended", "infra", "bad_user", "gratitude_loop", "turn_limit"]


def test_replay_rebuilds_every_kind_of_ending(sampler: object) -> None:
    for episode in rolled(sampler):
        transcript = transcribe(episode, {"user": "x"})
        assert transcribe(replay(transcript), {"user": "x"}) == transcript


def test_replay_of_the_agents_own_endings(sampler: object) -> None:
    for seat, said in [("assistant", ""), ("assistant", "x" * 17_000), ("user", END), ("user", f"ok {END}"), ("user", "")]:
        role = "user" if seat == "assistant" else "assistant"
        env = DialogueEnv(Speaker(lambda view, seed: f"reply {seed}", role), sampler, None, seat, population="uniform")
        env.reset(seed=0)
        env.step("hello")
        env.step(said)
        transcript = transcribe(env.episode, {})
        assert transcript.end_reason == ("user_ended" if END in said else "bad_action")
        assert transcribe(replay(transcript), {}) == transcript


@pytest.mark.parametrize("seat", ["assistant", "user"])
def test_replay_of_a_given_opening(sampler: object, seat: str) -> None:
    role = "user" if seat == "assistant" else "assistant"
    env = DialogueEnv(Speaker(lambda view, seed: f"reply {seed}", role), sampler, None, seat, population="uniform", max_turns=3)
    env.reset(seed=0, options={"opening": "hello there"})
    for text in ("fine", "and more", "the end of it"):
        if not env.episode.done:
            env.step(text)
    transcript = transcribe(env.episode, {})
    assert transcribe(replay(transcript), {}) == transcript
    assert len(go_on(transcript, 2, env.conductor.rules).rewards) == 1


def test_an_agents_engine_that_fails_is_infrastructure(sampler: object) -> None:
    def flaky(view: object, seed: int) -> Reply:
        return Reply("", error=BackendError("out of memory")) if len(view.messages) > 1 else Reply("ok")

    for episode in rolled(sampler, speaker=flaky):
        assert (episode.end_reason, episode.valid) == ("infra", False)
        transcript = transcribe(episode, {})
        assert transcribe(replay(transcript), {}) == transcript


def test_edited_records_are_noticed(sampler: object) -> None:
    whole = next(transcribe(e, {}) for e in rolled(sampler) if e.end_reason == "user_ended" and e.spec.profile_id == "p0")
    good = whole.to_json()
    for name, value in [("end_reason", "repetition"), ("messages", good["messages"][:-1]), ("messages", good["messages"][1:])]:
        with pytest.raises(TranscriptError):
            replay(type(whole)(**{**good, name: value}))


def test_going_on_from_a_turn(sampler: object) -> None:
    before = next(e for e in rolled(sampler) if e.end_reason == "turn_limit")
    transcript = transcribe(before, {})
    stage = conductor(sampler)
    episode = go_on(transcript, 3, stage.rules)
    assert [m.content for m in episode.messages] == [m["content"] for m in transcript.messages[:5]]
    (after,) = roll(stage, Speaker(agent, "assistant"), [episode])
    assert transcribe(after, {}).messages == transcript.messages  # same seeds, same speakers
    with pytest.raises(SpecError, match="turns 1 to 4"):
        go_on(transcript, 5, stage.rules)


class Scored:
    name, when, identity = "scored", "end", {"weights": "v7"}

    def __call__(self, profiles: object, dialogues: object) -> list[object]:
        raise AssertionError("not asked")


def test_run_directory_round_trip(sampler: object, tmp_path: object) -> None:
    stage = conductor(sampler)
    stage.record = RunDirectory(tmp_path / "run", {"seed": 1})
    episodes = roll(stage, Speaker(agent, "assistant"), SPECS)
    read = read_transcripts(tmp_path / "run")
    models = {"user": "test", "assistant": "agent"}
    assert read == [type(read[0])(**json.loads(json.dumps(transcribe(e, models).to_json()))) for e in episodes]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"] == {"seed": 1}
    assert set(stage.provenance()) == {"bank", "sampler", "models", "reward"}
    stage.reward = make_reward(Scored(), "assistant")
    assert stage.provenance()["reward"] == {"scored": {"weights": "v7"}}
    assert "numpy" in run["versions"]


def test_a_resumed_run_tells_who_went_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit, words in (("a1", ["play"]), ("b2", ["play", "--resume"]), ("c3", ["play", "--resume", "--quiet"])):
        monkeypatch.setattr(transcripts, "_commit", lambda commit=commit: commit)
        monkeypatch.setattr(transcripts.sys, "argv", ["/bin/usp-env", *words])
        RunDirectory(tmp_path, {"seed": 1}, resume=len(words) > 1, provenance={"bank": "x"})
    run = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert (run["commit"], run["command"], run["config"], run["provenance"]) == (
        "a1",
        ["usp-env", "play"],
        {"seed": 1},
        {"bank": "x"},
    )
    assert [(one["commit"], one["command"]) for one in run["resumed"]] == [
        ("b2", ["usp-env", "play", "--resume"]),
        ("c3", ["usp-env", "play", "--resume", "--quiet"]),
    ]
    assert run["resumed"][0].keys() == {"command", "commit", "versions", "hardware"}


def test_a_taken_directory_is_refused_and_nothing_is_lost(sampler: object, tmp_path: object) -> None:
    stage = conductor(sampler)
    stage.record = RunDirectory(tmp_path / "run", {"seed": 1, "user": "a"})
    roll(stage, Speaker(agent, "assistant"), SPECS[:3])
    text = (tmp_path / "run" / "transcripts.jsonl").read_bytes()
    with pytest.raises(RunDirectoryError, match="--resume"):
        RunDirectory(tmp_path / "run", {"seed": 1, "user": "a"})
    with pytest.raises(RunDirectoryError, match="seed: 1 → 2"):
        RunDirectory(tmp_path / "run", {"seed": 2, "user": "a"}, resume=True)
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory(tmp_path / "run" / "run.json", overwrite=True)
    assert (tmp_path / "run" / "transcripts.jsonl").read_bytes() == text
    resumed = RunDirectory(tmp_path / "run", {"seed": 1, "user": "a"}, resume=True)
    assert resumed.finished == {f"{100 + i:014x}" for i in range(2)}  # the third is an infrastructure failure
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "transcripts.jsonl").write_text("precious")
    with pytest.raises(RunDirectoryError, match="run.json is missing"):
        RunDirectory(tmp_path / "other", {}, resume=True)
    assert (tmp_path / "other" / "transcripts.jsonl").read_text() == "precious"
    (tmp_path / "run" / "run.json").write_text('{"config": [1]}')
    with pytest.raises(RunDirectoryError, match="damaged"):
        RunDirectory(tmp_path / "run", {"seed": 1}, resume=True)
    RunDirectory(tmp_path / "run", {"seed": 3}, overwrite=True)
    assert read_transcripts(tmp_path / "run") == []


def test_a_torn_last_line(sampler: object, tmp_path: object) -> None:
    stage = conductor(sampler)
    stage.record = RunDirectory(tmp_path / "run", {})
    roll(stage, Speaker(agent, "assistant"), SPECS[:3])
    file = tmp_path / "run" / "transcripts.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(TranscriptError, match="line 3: cut off"):
        read_transcripts(tmp_path / "run")
    assert len(read_transcripts(tmp_path / "run", torn="skip")) == 2
    assert len(RunDirectory(tmp_path / "run", {}, resume=True).finished) == 2
    assert len(read_transcripts(tmp_path / "run")) == 2
    file.write_bytes(file.read_bytes() + '{"profile": "🐍'.encode()[:-2])  # cut off within a character
    with pytest.raises(TranscriptError, match="line 3: cut off"):
        read_transcripts(tmp_path / "run")
    assert len(read_transcripts(tmp_path / "run", torn="skip")) == 2


@pytest.mark.parametrize(
    ("line", "error"),
    [("{}", "'episode_id' is missing"), ("[1]", "JSON object"), ("{oops", "line 1"), ('{"id": 1, "text": "foreign"}', "usp_env")],
)
def test_foreign_transcripts(tmp_path: object, line: str, error: str) -> None:
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(TranscriptError, match=error):
        read_transcripts(tmp_path / "t.jsonl")
    with pytest.raises(TranscriptError, match="neither"):
        read_transcripts(tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\n")
    with pytest.raises(TranscriptError, match="UTF-8"):
        read_transcripts(tmp_path / "latin")


def _write_forever(path: str) -> None:
    run = RunDirectory(path, {"x": 1}, resume=True)
    people = UniformSampler(ProfileBank([Profile(f"p{i}", "You.", "You.") for i in range(6)]))
    episodes = roll(conductor(people), Speaker(agent, "assistant"), SPECS)
    while True:
        for episode in episodes:
            run.write(transcribe(episode, {}))


def test_kill_minus_nine_loses_no_whole_line(tmp_path: object) -> None:
    RunDirectory(tmp_path / "run", {"x": 1})
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_forever, args=(str(tmp_path / "run"),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 30
    while (tmp_path / "run" / "transcripts.jsonl").stat().st_size < 200_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        writer.close()
    read = read_transcripts(tmp_path / "run", torn="skip")
    assert len(read) > 20
    kept = {t.episode_id for t in read if t.outcome != "infra_failure"}
    assert RunDirectory(tmp_path / "run", {"x": 1}, resume=True).finished == kept


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.text(), min_size=1, max_size=4))
def test_any_actions_are_written_and_read_back(texts: list[str], tmp_path_factory: object) -> None:
    folder = tmp_path_factory.mktemp("run") / "r"
    people = UniformSampler(ProfileBank([Profile("p0", "You.", "You.")]))
    env = DialogueEnv(
        Speaker(lambda view, seed: f"reply {seed}"), people, population="uniform", record=folder, max_turns=len(texts)
    )
    env.reset(seed=0)
    for text in texts:
        env.step(text)
        if env.episode.done:
            break
    (transcript,) = read_transcripts(folder)
    assert transcribe(replay(transcript), transcript.models) == transcript


def test_the_recorder_wraps_any_loop(sampler: object, tmp_path: object) -> None:
    env = RecordTranscripts(DialogueEnv(Speaker(user), sampler, population="uniform", max_turns=1), tmp_path / "run")
    for seed in range(3):
        env.reset(seed=seed)
        env.step("hello")
    assert len(read_transcripts(tmp_path / "run")) == 3
    with pytest.raises(SpecError, match="DialogueEnv"):
        RecordTranscripts(gym.make("CartPole-v1"), tmp_path / "other")


def test_last_utterance(sampler: object) -> None:
    env = LastUtterance(DialogueEnv(Speaker(lambda view, seed: "the newest"), sampler, population="uniform"))
    assert env.reset(seed=0)[0] == "the newest"
    assert env.step("x")[0] == "the newest"


def test_plan_spreads_over_populations(sampler: object) -> None:
    sampler.populations = ("uniform", "uniform2")
    draw = sampler.draw
    sampler.draw = lambda n, population, rng: draw(n, "uniform", rng)
    specs = plan(sampler, ["uniform", "uniform2"], 5, 0)
    assert specs == plan(sampler, ["uniform", "uniform2"], 9, 0)[:5]
    assert len({spec.episode_seed for spec in specs}) == 5


def test_partners_that_miscount_are_told_so(sampler: object) -> None:
    class Short(Speaker):
        def respond(self, views: object, seeds: object) -> list[Reply]:
            return []

    env = DialogueEnv(Short(user), sampler, population="uniform")
    with pytest.raises(UspError, match="one reply for each of 1 views, got 0"):
        env.reset(seed=0)


def test_numpy_seeds_are_accepted(sampler: object) -> None:
    env = DialogueEnv(Speaker(user), sampler, population="uniform")
    assert env.reset(seed=int(np.int64(3)))[0] == env.reset(seed=3)[0]


def test_a_resumed_run_runs_infrastructure_failures_again(sampler: object, tmp_path: object) -> None:
    stage, folder = conductor(sampler), tmp_path / "run"
    stage.record = run = RunDirectory(folder, {})
    roll(stage, Speaker(agent, "assistant"), SPECS[:3])  # the third user's server is gone
    first = read_transcripts(folder)
    lost = next(t for t in first if t.outcome == "infra_failure")
    resumed = RunDirectory(folder, {}, resume=True)
    assert resumed.finished == {t.episode_id for t in first} - {lost.episode_id}
    run.write(lost)  # down again: told once, at its last
    assert read_transcripts(folder) == [t for t in first if t != lost] + [lost]
    good = replace(lost, outcome="completed", valid=True, end_reason="user_ended", error=None)
    run.write(good)
    assert read_transcripts(folder) == [t for t in first if t != lost] + [good]
    assert len((folder / "transcripts.jsonl").read_bytes().split(b"\n")) == 6  # nothing is taken out of the file


def test_a_good_line_beats_failures_in_any_order(sampler: object, tmp_path: object) -> None:
    stage, folder = conductor(sampler), tmp_path / "run"
    stage.record = run = RunDirectory(folder, {})
    roll(stage, Speaker(agent, "assistant"), SPECS[:1])
    (good,) = read_transcripts(folder)
    run.write(replace(good, outcome="infra_failure", valid=False, error="late"))
    assert read_transcripts(folder) == [good]


def test_a_line_after_a_torn_one_is_kept(sampler: object, tmp_path: object) -> None:
    stage, folder = conductor(sampler), tmp_path / "run"
    stage.record = run = RunDirectory(folder, {})
    roll(stage, Speaker(agent, "assistant"), SPECS[:2])
    before = read_transcripts(folder)
    with open(folder / "transcripts.jsonl", "ab") as stream:
        stream.write(b'{"episode_id": "0000')  # another writer was killed here
    run.write(replace(before[0], episode_id="00000000000fff"))
    resumed = RunDirectory(folder, {}, resume=True)
    assert resumed.finished == {*(t.episode_id for t in before), "00000000000fff"}
    assert len(read_transcripts(folder)) == 3


def test_a_run_whose_bank_or_weights_changed_is_not_resumed(tmp_path: object) -> None:
    def stage(tag: str, weights: str) -> Conductor:
        made = conductor(UniformSampler(ProfileBank([Profile(f"p{i}", f"You {tag}.", "You.") for i in range(6)])))
        made.reward = make_reward(Scored(), "assistant")
        made.reward.parts[0][1].identity = {"weights": weights, "settings": EpisodeSpec("p", "uniform", 0)}  # not of JSON's kinds
        return made

    first, folder = stage("cook", "v1"), tmp_path / "run"
    first.record = RunDirectory(folder, {"bank": "b.jsonl"}, provenance=first.provenance())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for bank, weights, error in [("sail", "v1", "changed since.*bank: '"), ("cook", "v2", "reward.scored.weights: 'v1' → 'v2'")]:
        with pytest.raises(RunDirectoryError, match=error):
            RunDirectory(folder, {"bank": "b.jsonl"}, resume=True, provenance=stage(bank, weights).provenance())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    RunDirectory(folder, {"bank": "b.jsonl"}, resume=True, provenance=stage("cook", "v1").provenance())
    RunDirectory(folder, {"bank": "b.jsonl"}, resume=True)  # whoever does not tell is not asked
    RunDirectory(tmp_path / "untold", {})
    RunDirectory(tmp_path / "untold", {}, resume=True, provenance=first.provenance())
    (folder / "run.json").write_text('{"config": {}, "provenance": "v1"}')
    with pytest.raises(RunDirectoryError, match="damaged"):
        RunDirectory(folder, {}, resume=True)


def test_a_line_cut_off_at_any_byte_is_taken_out_and_nothing_else_moves(sampler: object, tmp_path: object) -> None:
    stage, folder = conductor(sampler), tmp_path / "run"
    stage.record = RunDirectory(folder, {})
    roll(stage, Speaker(agent, "assistant"), SPECS[4:6])
    file = folder / "transcripts.jsonl"
    first, second = file.read_bytes().split(b"\n")[:-1]
    kept = read_transcripts(folder)[1]
    cuts = [first[:cut] for cut in range(1, len(first))]
    halves = [b" " * (len(cut) // 2) + cut[len(cut) // 2 :] for cut in cuts]  # killed again while they were being blanked
    torn = [line for line in cuts + halves if not _parses(line)]
    assert len(torn) > 1.9 * len(first)
    file.write_bytes(b"\n".join([*torn, second, first[:9]]))
    assert RunDirectory(folder, {}, resume=True).finished == {kept.episode_id}
    assert file.read_bytes() == b"\n".join([*(b" " * len(line) for line in torn), second, b""])
    assert read_transcripts(folder) == [kept]


def _parses(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_a_line_of_another_kind_is_told_and_kept(sampler: object, tmp_path: object) -> None:
    RunDirectory(tmp_path / "run", {})
    file = tmp_path / "run" / "transcripts.jsonl"
    for line in (b'{"episode_id": "0"}\n', b"a note of mine\n"):
        file.write_bytes(line)
        with pytest.raises(TranscriptError, match="line 1"):
            RunDirectory(tmp_path / "run", {}, resume=True)
        assert file.read_bytes() == line


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_runs_that_begin_at_once_one_gets_the_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, resume: bool
) -> None:
    free, folder = transcripts.check_free, tmp_path / "run"

    def overtaken(*asked: object) -> None:
        free(*asked)
        monkeypatch.undo()
        folder.mkdir()
        (folder / "transcripts.jsonl").write_text("the other's first line")

    monkeypatch.setattr(transcripts, "check_free", overtaken)
    with pytest.raises(RunDirectoryError, match="another run has just begun"):
        RunDirectory(folder, {}, resume)
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("transcripts.jsonl", "the other's first line")]
