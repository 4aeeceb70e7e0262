"""The vector environment: the same episodes as single ones, every autoreset mode, failures, Gymnasium's own vector envs."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from doubles import Speaker
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from usp_env.env import DialogueEnv
from usp_env.errors import BackendError, CallOrderError, InvalidActionError, SpecError, UnknownNameError
from usp_env.records import EpisodeSpec, Reply
from usp_env.vector import DialogueVectorEnv

LENGTHS = (2, 3, 5, 3, 1, 4)  # user turns by lane; lanes 1 and 3 end in the same step


def user(view: object, seed: int) -> Reply:
    """Person i of the bank speaks LENGTHS[i] times, then ends."""
    index = int(view.profile.id[1:])
    said = sum(message.role == "user" for message in view.messages)
    return Reply("", ended=True) if said == LENGTHS[index] else Reply(f"person {index}, turn {said}, noise {seed}")


def make(
    sampler: object, n: int = 6, mode: str = "SameStep", speaker: Speaker | None = None, **settings: object
) -> DialogueVectorEnv:
    return DialogueVectorEnv(n, speaker or Speaker(user), sampler, population="uniform", autoreset_mode=mode, **settings)


LANES = [{"profile_id": f"p{i}"} for i in range(6)]


def test_gym_makes_the_native_vector_env() -> None:
    for mode in ("SameStep", AutoresetMode.NEXT_STEP, "Disabled"):
        envs = gym.make_vec("usp_env/Assistant-v0", num_envs=3, user="scripted", reward=None, autoreset_mode=mode)
        assert isinstance(envs.unwrapped, DialogueVectorEnv)
        assert envs.metadata["autoreset_mode"] == AutoresetMode(mode)
        observations, infos = envs.reset(seed=0)
        assert envs.observation_space.contains(observations)
        assert infos["_turn"].all()
    with pytest.raises(UnknownNameError, match="did you mean 'SameStep'"):
        gym.make_vec("usp_env/Assistant-v0", num_envs=3, user="scripted", reward=None, autoreset_mode="SameStp")


def test_one_batched_call_a_turn(sampler: object) -> None:
    speaker = Speaker(user)
    envs = make(sampler, speaker=speaker)
    envs.reset(seed=0, options=LANES)
    assert speaker.calls == [6]
    envs.step(["go on"] * 6)
    assert speaker.calls[1] == 6


@pytest.mark.parametrize("n", [1, 6])
def test_lanes_are_the_single_environments(sampler: object, n: int) -> None:
    envs = make(sampler, n, "NextStep")
    singles = [DialogueEnv(Speaker(user), sampler, population="uniform") for _ in range(n)]
    observations, _ = envs.reset(seed=20)
    expected = [single.reset(seed=20 + lane)[0] for lane, single in enumerate(singles)]
    assert list(observations) == expected
    over = [False] * n
    for step in range(12):
        observations, rewards, terminations, truncations, infos = envs.step([f"answer {step}"] * n)
        for lane, single in enumerate(singles):
            if over[lane]:
                observation, info = single.reset()
                over[lane], reward, ended = False, 0.0, (False, False)
            else:
                observation, reward, *ended, info = single.step(f"answer {step}")
                over[lane] = any(ended)
            assert observations[lane] == observation
            assert rewards[lane] == reward
            assert (terminations[lane], truncations[lane]) == tuple(ended)
            for key, value in info.items():
                assert infos[f"_{key}"][lane]
                assert infos[key][lane] == value


def lengths_seen(envs: object, steps: int = 5) -> list[tuple[int, int]]:
    ends = []
    for step in range(steps):
        _, _, terminations, truncations, _ = envs.step([f"answer {step}"] * 6)
        ends += [(step + 1, int(lane)) for lane in np.flatnonzero(terminations | truncations)]
    return ends


def test_same_step(sampler: object) -> None:
    envs = make(sampler)
    envs.reset(seed=0, options=LANES)
    observations, _, terminations, _, infos = envs.step(["answer"] * 6)
    assert terminations.tolist() == [False, False, False, False, True, False]
    final = infos["final_obs"][4]
    assert [m["content"] for m in final][-1] == "answer"
    assert infos["final_info"]["end_reason"][4] == "user_ended"
    assert infos["_final_info"].tolist() == terminations.tolist()
    assert len(observations[4]) == 1  # the next episode's opening
    assert infos["turn"][4] == 1
    assert infos["end_reason"][4] is None


def test_next_step(sampler: object) -> None:
    envs = make(sampler, mode="NextStep")
    envs.reset(seed=0, options=LANES)
    observations, _, terminations, _, infos = envs.step(["answer"] * 6)
    assert terminations[4]
    assert "final_obs" not in infos
    assert len(observations[4]) == 2  # the finished conversation
    observations, rewards, terminations, truncations, infos = envs.step(["answer"] * 6)
    assert (rewards[4], terminations[4], truncations[4], len(observations[4])) == (0.0, False, False, 1)
    assert terminations[0]


def test_disabled_needs_a_reset_mask(sampler: object) -> None:
    envs = make(sampler, mode="Disabled")
    envs.reset(seed=0, options=LANES)
    envs.step(["answer"] * 6)
    with pytest.raises(CallOrderError, match=r"lanes \[4\]"):
        envs.step(["answer"] * 6)
    before = envs.episodes[0]
    mask = np.arange(6) == 4
    observations, infos = envs.reset(options={"reset_mask": mask, "profile_id": "p2"})
    assert envs.episodes[0] is before
    assert infos["_turn"].tolist() == mask.tolist()
    assert observations[4][0]["content"].startswith("person 2, turn 0")
    assert envs.step(["answer"] * 6)[2].tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_reset_mask_works_in_every_mode(sampler: object, mode: str) -> None:
    envs = make(sampler, mode=mode)
    envs.reset(seed=0, options=LANES)
    envs.step(["answer"] * 6)
    lanes = [{}, {"profile_id": "p4"}, *[{}] * 4]
    observations, infos = envs.reset(seed=9, options={"reset_mask": np.arange(6) == 1, "lanes": lanes})
    assert observations[1][0]["content"].startswith("person 4")
    assert len(observations[0]) == 3
    assert infos["_turn"].sum() == 1


def test_lanes_end_apart_and_together(sampler: object) -> None:
    envs = make(sampler, mode="NextStep")
    envs.reset(seed=0, options=LANES)
    firsts = {}
    for step, lane in lengths_seen(envs):
        firsts.setdefault(lane, step)
    assert [firsts[lane] for lane in range(6)] == list(LENGTHS)


def env_fn(index: int) -> object:
    def build() -> gym.Env:
        return gym.make("usp_env/Assistant-v0", user="scripted", reward=None, max_turns=1 + index % 4)

    return build


def steps_to_the_end(index: int) -> int:
    env = env_fn(index)()
    env.reset(seed=index)
    steps = 1
    while not any(env.step(f"answer {steps - 1}")[2:4]):
        steps += 1
    return steps


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_gymnasiums_vector_envs(mode: AutoresetMode, kind: str) -> None:
    expected = [steps_to_the_end(index) for index in range(6)]
    assert len(set(expected)) >= 3
    assert len(set(expected)) < 6  # two lanes end in the same step
    functions = [env_fn(index) for index in range(6)]
    envs = (
        SyncVectorEnv(functions, autoreset_mode=mode)
        if kind == "sync"
        else AsyncVectorEnv(functions, shared_memory=False, autoreset_mode=mode)
    )
    try:
        envs.reset(seed=0)
        firsts: dict[int, int] = {}
        for step in range(1, 5):
            observations, _, terminations, truncations, infos = envs.step([f"answer {step - 1}"] * 6)
            for lane in np.flatnonzero(terminations | truncations):
                firsts.setdefault(int(lane), step)
                if mode == AutoresetMode.SAME_STEP:
                    assert infos["final_obs"][lane][-2]["role"] in ("user", "assistant")
                    assert infos["final_info"]["outcome"][lane] == "completed"
                    assert len(observations[lane]) == 1
        assert [firsts[lane] for lane in range(6)] == expected
    finally:
        envs.close()


def test_options_that_do_not_fit_raise_and_move_nothing(sampler: object) -> None:
    envs = make(sampler)
    envs.reset(seed=0, options=LANES)
    before = list(envs.episodes)
    for options, error in [
        (LANES[:2], "6 dicts"),
        ({"lanes": "x"}, "6 dicts"),
        ({"reset_mask": np.zeros(6, dtype=bool)}, "at least one True"),
        ({"reset_mask": [1, 0, 0, 0, 0, 0]}, "reset_mask"),
    ]:
        with pytest.raises(SpecError, match=error):
            envs.reset(options=options)
    for options in ({"populaton": "x"}, [*[{}] * 5, {"profile_id": "nobody"}]):
        with pytest.raises(UnknownNameError):
            envs.reset(options=options)
    for options in (5, {"lanes": 5}, {"reset_mask": "abc"}):
        with pytest.raises(SpecError):
            envs.reset(options=options)
    for index in (-1, 6, "a"):
        with pytest.raises(SpecError, match="lane"):
            envs.snapshot(index)
    with pytest.raises(SpecError):
        envs.step(None)
    with pytest.raises(SpecError, match="seed"):
        envs.reset(seed=[1, 2])
    for actions, error in [(["a"] * 5, SpecError), ("abcdef", SpecError), (["a"] * 5 + [3], InvalidActionError)]:
        with pytest.raises(error):
            envs.step(actions)
    assert envs.episodes == before
    with pytest.raises(CallOrderError, match="reset"):
        make(sampler).step(["a"] * 6)


def test_a_lane_that_cannot_open_starts_failed(sampler: object) -> None:
    def flaky(view: object, seed: int) -> Reply:
        down = view.opening and view.profile.id == "p2"
        return Reply("", error=BackendError("down")) if down else Reply(f"noise {seed}")

    envs = make(sampler, mode="Disabled", speaker=Speaker(flaky))
    observations, infos = envs.reset(seed=0, options=LANES)
    assert observations[2] == ()
    assert envs.observation_space.contains(observations)
    _, rewards, terminations, truncations, infos = envs.step(["answer"] * 6)
    assert truncations.tolist() == [False, False, True, False, False, False]
    assert (infos["outcome"][2], infos["valid"][2], rewards[2]) == ("infra_failure", False, 0.0)
    assert infos["valid"].sum() == 5


def test_a_failed_batch_masks_every_lane(sampler: object) -> None:
    def down(view: object, seed: int) -> Reply:
        raise BackendError("server gone")

    envs = make(sampler, mode="Disabled", speaker=Speaker(down))
    envs.reset(options={"opening": "hi"})
    _, rewards, terminations, truncations, infos = envs.step(["answer"] * 6)
    assert truncations.all()
    assert not infos["valid"].any()
    assert (rewards == 0).all()
    assert set(infos["outcome"]) == {"infra_failure"}
    # A trainer's weights: a batch of failures has no gradient.
    assert float((infos["valid"] * np.ones(6)).sum()) == 0.0


def test_rewards_are_batched_and_differ_by_lane(sampler: object) -> None:
    def turns(profile: object, dialogue: object) -> float:
        return float(dialogue.turns)

    envs = make(sampler, reward=turns, mode="Disabled", max_turns=2)
    envs.reset(seed=0, options=LANES)
    _, rewards, terminations, _, infos = envs.step(["answer"] * 6)
    assert rewards.tolist() == [0, 0, 0, 0, 1, 0]
    assert infos["reward_terms"][4] == {"turns": 1.0}
    assert infos["utterance_rewards"][4] == [1.0]


def test_fork_and_snapshot_of_a_lane(sampler: object) -> None:
    envs = make(sampler)
    envs.reset(seed=0, options=LANES)
    envs.step(["one"] * 6)
    parent = envs.snapshot(2)
    children = envs.fork(2, 4)
    said = {observation[-1]["content"] for observation in children.step(["two"] * 4)[0]}
    assert len(said) == 4
    assert envs.snapshot(2) == parent
    same = envs.fork(2, 3, diverge=False).step(["two"] * 3)[0]
    assert len({observation[-1]["content"] for observation in same}) == 1
    assert envs.restore(5, parent) == envs.episodes[2].observation()


def test_spec_alone_equals_the_spec_inside_64(sampler: object) -> None:
    specs = [EpisodeSpec(f"p{i % 6}", "uniform", 1000 + i) for i in range(64)]
    envs = make(sampler, 64, "Disabled")
    envs.reset(options=[{"episode": spec} for spec in specs])
    many = envs.step(["answer"] * 64)[0]
    alone = DialogueEnv(Speaker(user), sampler, population="uniform")
    for lane, spec in enumerate(specs):
        alone.reset(options={"episode": spec})
        assert alone.step("answer")[0] == many[lane]
