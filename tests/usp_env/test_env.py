"""The single environment: Gymnasium's contract, options, failure, determinism, forks."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from doubles import Speaker
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import usp_env
from usp_env.backends.base import Generation
from usp_env.dialogue import END, Act
from usp_env.env import DialogueEnv
from usp_env.errors import (
    BackendError,
    CallOrderError,
    InvalidActionError,
    MissingAssetError,
    RunDirectoryError,
    SpecError,
    UnknownNameError,
    UspError,
)
from usp_env.profiles import Profile, ProfileBank
from usp_env.records import EpisodeSpec, Reply, Snapshot

WORDS = ("a soup recipe please", "without onions", "how long does it keep?", "and in the freezer?", "what about bread with it")
SEATS = {"Assistant": {"user": "scripted"}, "User": {"assistant": "scripted"}}


def make(seat: str = "Assistant", **settings: object) -> gym.Env:
    return gym.make(f"usp_env/{seat}-v0", **{"reward": None, **SEATS[seat], **settings})


def talk(env: gym.Env, steps: int = 20) -> list[object]:
    """Everything an episode shows, until it ends."""
    observation, info = env.reset(seed=11)
    seen: list[object] = [observation, info]
    for k in range(steps):
        outcome = env.step(WORDS[k % len(WORDS)])
        seen += outcome
        if outcome[2] or outcome[3]:
            break
    return seen


@pytest.mark.parametrize("seat", SEATS)
def test_check_env(seat: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(seat).unwrapped)
        check_env(make(seat, render_mode="ansi").unwrapped)


@pytest.mark.parametrize("seat", SEATS)
def test_same_seed_same_episode(seat: str) -> None:
    assert talk(make(seat)) == talk(make(seat))


def test_no_global_rng_is_touched() -> None:
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    for seat in SEATS:
        talk(make(seat))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_info_at_the_end() -> None:
    *_, info = talk(make("User", max_turns=3))
    assert info["end_reason"] == "turn_limit"
    assert (info["outcome"], info["valid"], info["turn"]) == ("completed", True, 3)
    assert info["utterance_rewards"] == [0.0, 0.0, 0.0]
    assert isinstance(info["target_profile"], Profile)
    assert info["reward_terms"] == {}


def test_spec_rebuilds_the_episode(sampler: object) -> None:
    def user(view: object, seed: int) -> str:
        return f"seeded {seed}"

    env = DialogueEnv(Speaker(user), sampler, population="uniform")
    _, info = env.reset(seed=5)
    first = env.step("Hello")[0]
    spec = EpisodeSpec(info["profile_id"], info["population"], info["episode_seed"])
    fresh = DialogueEnv(Speaker(user), sampler, population="uniform")
    fresh.reset(options={"episode": spec})
    assert fresh.step("Hello")[0] == first
    fresh.reset(options={"episode": {"profile_id": "p1", "population": "uniform", "episode_seed": 1, "opening": "hey"}})
    assert fresh.episode.observation() == ({"role": "user", "content": "hey"},)


def test_reset_options(sampler: object) -> None:
    env = DialogueEnv(Speaker(lambda view, seed: f"I am {view.profile.id}"), sampler, population="uniform")
    assert env.reset(seed=0, options={"profile_id": "p3"})[0][0]["content"] == "I am p3"
    mine = Profile("mine", "You sew.", "You ramble.")
    assert env.reset(options={"profile": mine})[1]["profile_id"] == "mine"
    assert env.reset(options={"opening": "hello there"})[0][0]["content"] == "hello there"
    for options, error in [
        ({"populaton": "uniform"}, "did you mean 'population'"),
        ({"population": "uniforn"}, "did you mean 'uniform'"),
        ({"profile_id": "p9"}, "unknown profile"),
        ({"user_id": "u"}, "unknown user_id"),
    ]:
        with pytest.raises(UnknownNameError, match=error):
            env.reset(options=options)
    for options, error in [
        ({"profile_id": "p1", "population": "uniform"}, "both say"),
        ({"episode": {"profile_id": "p1"}}, "EpisodeSpec"),
        ({"episode": EpisodeSpec("p1", "uniform", 1), "opening": "hi"}, "stands alone"),
        ({"opening": " "}, "opening"),
        ({"profile": "p1"}, "usp_env.Profile"),
    ]:
        with pytest.raises(SpecError, match=error):
            env.reset(options=options)


def test_wrong_order_and_wrong_types() -> None:
    env = make().unwrapped
    with pytest.raises(CallOrderError, match="reset"):
        env.step("hi")
    env.reset(seed=0)
    with pytest.raises(InvalidActionError, match="int"):
        env.step(3)
    env.step("")
    with pytest.raises(CallOrderError, match="bad_action"):
        env.step("more")
    with pytest.raises(gym.error.ResetNeeded):
        make().step("hi")
    env.reset(seed=0)
    env.close()
    with pytest.raises(CallOrderError, match="reset"):
        env.step("hi")


@pytest.mark.parametrize("seed", [-1, 1.5, "x", True])
def test_seeds_are_whole_numbers(sampler: object, seed: object) -> None:
    env = DialogueEnv(Speaker(sampled), sampler, population="uniform")
    vector = usp_env.DialogueVectorEnv(2, Speaker(sampled), sampler, population="uniform")
    for call in (
        lambda: env.reset(seed=seed),
        lambda: vector.reset(seed=seed),
        lambda: vector.reset(seed=[0, seed]),
        lambda: usp_env.make_specs(1, "uniform", seed, sampler),
    ):
        with pytest.raises(SpecError, match="whole number"):
            call()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"user": "scriptd"}, "did you mean 'scripted'"),
        ({"user": "scripted", "population": "minorty"}, "did you mean 'minority'"),
        ({"user": "scripted", "max_turn": 3}, "did you mean 'max_turns'"),
        ({"user": "usp:smollm2-135m?temprature=1"}, "did you mean 'temperature'"),
        ({"user": "scripted", "split": "tset"}, "did you mean 'test'"),
    ],
)
def test_names_are_suggested(settings: dict[str, object], error: str) -> None:
    with pytest.raises(UnknownNameError, match=error):
        make(**settings)


def test_the_user_seats_default_reward_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("USP_ENV_HOME", str(tmp_path))
    monkeypatch.setattr("usp_env.backends._loaded", {})  # another test may have it
    with pytest.raises(MissingAssetError, match=r"usp-env fetch.*reward=None"):
        gym.make("usp_env/User-v0", assistant="scripted")


@pytest.mark.assets
def test_the_user_seats_default_reward_pays_the_one_who_speaks_as_the_profile_does() -> None:
    """`0.8*cycle+0.2*human` on the packaged models: the person's own words against a stranger's."""
    pytest.importorskip("torch")
    person = ProfileBank.load("sharegpt").get("274bRF0_0")
    own = [
        "give me a list of 20 objections landlords in the UK have when i ask to rent their flat for subletting",
        "more objections please, only from landlords",
        "what would the plan look like if i want to rent to rent 5 houses?",
    ]
    strange = ["As an AI language model, I am happy to help!", "Photosynthesis turns light into sugar.", "Have a wonderful day!"]
    totals = []
    for lines in (own, own, strange):
        env = gym.make("usp_env/User-v0", assistant="scripted", max_turns=3)
        env.reset(seed=1, options={"profile": person})
        for line in lines:
            _, reward, terminated, truncated, info = env.step(line)
        assert terminated or truncated
        assert set(info["reward_terms"]) == {"cycle", "human"}
        totals.append(reward)
    assert totals[0] == totals[1]
    assert totals[0] > totals[2] + 0.2


def test_a_partner_of_the_wrong_side_is_refused(sampler: object) -> None:
    with pytest.raises(SpecError, match="other side"):
        DialogueEnv(Speaker(lambda view, seed: "hi", role="assistant"), sampler, population="uniform")


def test_backend_failures_are_typed(sampler: object) -> None:
    def down(view: object, seed: int) -> Reply:
        raise BackendError("connection refused")

    env = DialogueEnv(Speaker(down), sampler, population="uniform")
    with pytest.raises(BackendError, match="connection refused"):
        env.reset(seed=0)
    with pytest.raises(CallOrderError):
        env.step("hi")
    env.reset(options={"opening": "hi"})
    _, reward, terminated, truncated, info = env.step("Hello")
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert (info["outcome"], info["valid"], info["reward_terms"]) == ("infra_failure", False, {})
    silent = DialogueEnv(Speaker(lambda view, seed: ""), sampler, population="uniform")
    with pytest.raises(BackendError, match="bad_user"):
        silent.reset(seed=0)


def test_act_carries_the_engines_facts(sampler: object) -> None:
    env = DialogueEnv(Speaker(lambda view, seed: f"q{seed}"), sampler, population="uniform")
    env.reset(seed=0)
    act = Act("Hello", token_ids=[1, 2], logprobs=[-0.1, -0.2], finish_reason="stop", usage={"completion_tokens": 2})
    info = env.step(act)[4]
    message = env.episode.messages[1]
    assert (message.token_ids, message.finish_reason) == ((1, 2), "stop")
    assert info["usage"]["assistant"] == {"completion_tokens": 2}


def test_an_exception_in_a_reward_names_episode_and_turn(sampler: object) -> None:
    def broken(profile: object, dialogue: object) -> float:
        raise ZeroDivisionError("mine")

    env = DialogueEnv(Speaker(lambda view, seed: f"q{seed}"), sampler, broken, population="uniform", max_turns=1)
    _, info = env.reset(seed=0)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        env.step("Hello")
    assert caught.value.__notes__ == [f"while scoring episode {info['episode_id']}, turn 1"]


def test_unscored_is_invalid_and_pays_nothing(sampler: object) -> None:
    env = DialogueEnv(Speaker(lambda v, s: f"q{s}"), sampler, lambda profile, dialogue: None, population="uniform", max_turns=1)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step("Hello")
    assert (reward, truncated, info["end_reason"], info["outcome"], info["valid"]) == (0.0, True, "turn_limit", "unscored", False)


def test_the_sampler_hears_of_valid_episodes_only(sampler: object) -> None:
    heard = []
    sampler.observe = heard.extend
    env = DialogueEnv(Speaker(lambda view, seed: f"q{seed}"), sampler, population="uniform", max_turns=2)
    env.reset(seed=0)
    env.step("a")
    assert heard == []
    env.step("b")
    assert [(s.turns, s.end_reason, s.outcome) for s in heard] == [(2, "turn_limit", "completed")]
    env.conductor.partner = Speaker(lambda view, seed: Reply("", error=BackendError("x")))
    env.reset(options={"opening": "hi"})
    env.step("a")
    assert len(heard) == 1


def sampled(view: object, seed: int) -> str:
    return f"question {seed % 1000}"


def test_fork(sampler: object) -> None:
    env = DialogueEnv(Speaker(sampled), sampler, population="uniform")
    env.reset(seed=4)
    before = env.snapshot()
    children = env.fork(8)
    said = {child.step("Same reply")[0][-1]["content"] for child in children}
    assert len(said) >= 2
    assert env.snapshot() == before
    repeats = {child.step("Same reply")[0][-1]["content"] for child in env.fork(4, diverge=False)}
    assert repeats == {env.step("Same reply")[0][-1]["content"]}
    assert len({child.reset()[1]["episode_seed"] for child in children}) == 8


def test_fork_keeps_wrappers(sampler: object) -> None:
    env = gym.wrappers.RecordEpisodeStatistics(
        gym.wrappers.TimeLimit(DialogueEnv(Speaker(sampled), sampler, population="uniform"), 2)
    )
    env.reset(seed=4)
    env.step("a")
    one, two = usp_env.fork(env, 2)
    assert type(one) is type(env)
    assert one.step("b")[3]  # TimeLimit has counted the parent's step
    assert two.unwrapped is not env.unwrapped
    assert not env.unwrapped.episode.done
    assert len(env.unwrapped.episode.rewards) == 1


def test_snapshot_restores_in_another_process() -> None:
    env = make("User").unwrapped
    env.reset(seed=2)
    env.step("first")
    text = json.dumps(env.snapshot().to_json())
    program = (
        "import json, sys, gymnasium as gym, usp_env\n"
        "from usp_env.records import Snapshot\n"
        "env = gym.make('usp_env/User-v0', assistant='scripted', reward=None).unwrapped\n"
        "env.restore(Snapshot.from_json(json.load(sys.stdin)))\n"
        "print(json.dumps([env.step('second')[0], env.reset()[1]['episode_seed']]))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=text, capture_output=True, text=True, check=True)
    observation, seed = json.loads(done.stdout)
    assert observation == list(env.step("second")[0])
    assert seed == env.reset()[1]["episode_seed"]
    with pytest.raises(SpecError, match="seat"):
        make().unwrapped.restore(Snapshot.from_json(json.loads(text)))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(min_size=0, max_size=60) | st.sampled_from([END, "<think>", "</think>", "\x00", "\u2028", "<|im_end|>", "\ud800"]))
def test_any_text_is_an_action(text: str) -> None:
    for seat in SEATS:
        env = _CACHED.setdefault(seat, make(seat).unwrapped)
        env.reset(seed=0)
        observation, reward, terminated, truncated, info = env.step(text)
        assert env.observation_space.contains(observation)
        assert isinstance(reward, float)
        assert not (terminated and truncated)
        json.dumps(info["messages"]).encode()


_CACHED: dict[str, gym.Env] = {}


def test_context_limit_is_reported(sampler: object) -> None:
    full = Reply("", generation=Generation("", finish_reason="context_limit"))
    env = DialogueEnv(Speaker(lambda view, seed: "hi" if view.opening else full), sampler, population="uniform")
    env.reset(seed=0)
    _, _, terminated, truncated, info = env.step("Hello")
    assert (terminated, truncated, info["end_reason"], info["valid"]) == (False, True, "context_limit", True)


def test_make_specs(sampler: object) -> None:
    specs = usp_env.make_specs(5, "uniform", 3, sampler)
    assert specs == usp_env.make_specs(5, "uniform", 3, sampler)
    assert len({spec.episode_seed for spec in specs}) == 5


@pytest.mark.parametrize(
    "options",
    [
        5,
        "x",
        {"opening": "\ud800"},
        {"opening": ""},
        {"profile_id": 5},
        {"episode": {"profile_id": 3}},
        {"episode": {"profile_id": "p1", "population": "x", "episode_seed": "s"}},
        {"user_id": 4},
        {"profile_id": []},
        {"population": np.array(["a", "b"])},
        {"population": ""},
        {"episode": {"profile_id": ["p1"], "population": "x", "episode_seed": 1}},
        {"episode": {"profile_id": "p1", "population": 3, "episode_seed": 1}},
        {"episode": {"profile_id": "p1", "population": "x", "episode_seed": True}},
        {"episode": {"profile_id": "p1", "population": "x", "episode_seed": 2**63}},
        {"episode": {"profile_id": "p1", "population": "x", "episode_seed": 1, "opening": 5}},
    ],
)
def test_odd_reset_options_are_project_errors(sampler: object, options: object) -> None:
    env = DialogueEnv(Speaker(sampled), sampler, population="uniform")
    with pytest.raises(UspError):
        env.reset(options=options)


@pytest.mark.parametrize(
    "settings", [{"keep_think": "no"}, {"bad_action_reward": "x"}, {"repetition_ratio": None}, {"gratitude_words": float("nan")}]
)
def test_odd_settings_are_project_errors(settings: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=next(iter(settings))):
        make(**settings)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("turn", "x"),
        ("spec", {"profile_id": "p"}),
        ("messages", [{}]),
        ("rules", {"max_turns": -5}),
        ("profile", {"id": 1}),
        ("tokens", None),
    ],
)
def test_tampered_snapshots_are_project_errors(sampler: object, path: str, value: object) -> None:
    env = DialogueEnv(Speaker(sampled), sampler, population="uniform")
    env.reset(seed=0)
    before = env.episode
    data = json.loads(json.dumps(env.snapshot().to_json()))
    with pytest.raises(SpecError):
        env.restore(Snapshot.from_json({**data, "state": {**data["state"], path: value}}))
    for rng in ({"a": 1}, 5):
        with pytest.raises(SpecError, match="PCG64"):
            env.restore(Snapshot.from_json({**data, "rng": rng}))
    for n in (0, -1, "a"):
        with pytest.raises(SpecError, match="branches"):
            env.fork(n)
    assert env.episode is before


def test_a_run_directory_that_cannot_be_made() -> None:
    with pytest.raises(RunDirectoryError, match="choose another"):
        make(record="/proc/nowhere/run")
