"""The user seat's default reward, end to end: `0.8*cycle+0.2*human` with a scripted generator, embedder and scorer.

The embedder gives the four texts these angles, and every dialogue the same generated profile unless a test says otherwise:

    cos(OF, OF') = .6, cos(SC, SC') = .2        cc = ½ (.6 + .2) = .4
    P(human): "a soup please" 1, "without onions" .5, "so how long then" .3        mean .6

    r = .8·.4 + .2·human = (.52, .42, .38)        R = .32 + .2·.6 = .44
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from doubles import Speaker

import usp_env
from usp_env.backends.base import Request
from usp_env.backends.scripted import Line, ScriptedBackend
from usp_env.dialogue import END
from usp_env.env import DialogueEnv
from usp_env.errors import BackendError
from usp_env.extraction.generator import ProfileGenerator
from usp_env.profiles import Profile
from usp_env.vector import DialogueVectorEnv

REWARD = "0.8*cycle+0.2*human"
SAID = ("a soup please", "without onions", "so how long then")
HUMAN = dict(zip(SAID, (1.0, 0.5, 0.3), strict=True))
OF, SC = "You want a recipe.", "You write short turns."
OTHER = "You want to travel."  # cos .2 with any given objective
ANGLES = {OF: (0.6, 0.8, 0.0), SC: (0.2, 0.0, 0.96**0.5), OTHER: (0.2, 0.0, 0.96**0.5)}


class Stage:
    """The three models behind the reward, with what they were asked."""

    def __init__(self) -> None:
        self.backend = ScriptedBackend(self._line)
        self.reply: Callable[[Request], Line] = lambda request: f"{OF}\n\n{SC}"
        self.embedded: list[list[str]] = []
        self.scored: list[list[str]] = []
        self.score: Callable[[str], float] = lambda text: HUMAN[text]

    def _line(self, request: Request) -> Line:
        return self.reply(request)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.embedded.append(list(texts))
        return np.array([ANGLES.get(text, (1.0, 0.0, 0.0)) for text in texts])  # a given half is the first axis

    def human(self, texts: Sequence[str]) -> np.ndarray:
        self.scored.append(list(texts))
        return np.array([self.score(text) for text in texts])

    @property
    def calls(self) -> tuple[list[int], int, int]:
        """Requests of each generator call; calls of the embedder and of the scorer."""
        return self.backend.batches, len(self.embedded), len(self.scored)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage()
    monkeypatch.setattr("usp_env.extraction.generator.load_generator", lambda spec: ProfileGenerator(made.backend))
    monkeypatch.setattr("usp_env.models.embedders.load", lambda name: made.embed)
    monkeypatch.setattr("usp_env.models.scorers.load", lambda name: made.human)
    return made


def assistant() -> Speaker:
    return Speaker(lambda view, seed: f"Answer {len(view.messages)}.", role="assistant")


def make(sampler: object, **settings: Any) -> DialogueEnv:
    return DialogueEnv(assistant(), sampler, REWARD, "user", **{"population": "uniform", "max_turns": 3, **settings})


def play(env: gym.Env, said: Sequence[str] = SAID) -> tuple[list[float], dict[str, Any], tuple[bool, bool]]:
    env.reset(seed=5)
    rewards = []
    for text in said:
        _, reward, terminated, truncated, info = env.step(text)
        rewards.append(reward)
    return rewards, info, (terminated, truncated)


# ── values ───────────────────────────────────────────────────────────────────────────────────────


def test_terminal(stage: Stage, sampler: object) -> None:
    rewards, info, flags = play(make(sampler))
    assert rewards == pytest.approx([0.0, 0.0, 0.44])
    assert info["utterance_rewards"] == pytest.approx([0.52, 0.42, 0.38])  # Eq. 6, no factor 2
    assert info["reward_terms"] == pytest.approx({"cycle": 0.32, "human": 0.12})
    assert (info["outcome"], info["valid"], flags) == ("completed", True, (False, True))
    assert stage.calls == ([1], 1, 1)  # no model before the end


def test_dense_is_causal_and_telescopes(stage: Stage, sampler: object) -> None:
    # cc after one utterance ½ (.2 + .2) = .2, later .4: Φ = .16 + .2·1, .32 + .2·.75, .32 + .2·.6 = .36, .47, .44
    def reply(request: Request) -> str:
        heard = [text for text in SAID if text in request.messages[1]["content"]]  # type: ignore[index]
        assert heard == list(SAID[: len(stage.backend.history)])  # what was said so far, nothing of the future
        return f"{OTHER if len(heard) == 1 else OF}\n\n{SC}"

    stage.reply = reply
    rewards, info, _ = play(make(sampler, reward_mode="dense"))
    assert rewards == pytest.approx([0.36, 0.11, -0.03])
    assert sum(rewards) == pytest.approx(0.44)
    assert info["utterance_rewards"] == pytest.approx([0.52, 0.42, 0.38])  # the same vector in every mode


def test_saying_it_all_again_changes_nothing(stage: Stage, sampler: object) -> None:
    once, _, _ = play(make(sampler))
    twice, info, _ = play(make(sampler, max_turns=6), SAID * 2)
    assert sum(twice) == pytest.approx(sum(once)) == pytest.approx(0.44)
    assert info["utterance_rewards"] == pytest.approx([0.52, 0.42, 0.38] * 2)


def test_an_end_without_words_is_no_utterance(stage: Stage, sampler: object) -> None:
    rewards, info, flags = play(make(sampler), [*SAID[:2], END])
    assert rewards == pytest.approx([0.0, 0.0, 0.32 + 0.2 * 0.75])
    assert info["utterance_rewards"] == pytest.approx([0.52, 0.42])
    assert flags == (True, False)


def test_an_end_after_words_is_one(stage: Stage, sampler: object) -> None:
    rewards, info, _ = play(make(sampler), [SAID[0], f"{SAID[1]} {END}"])
    assert rewards == pytest.approx([0.0, 0.32 + 0.2 * 0.75])
    assert info["utterance_rewards"] == pytest.approx([0.52, 0.42])
    assert END not in str(stage.backend.history[0].messages)


def test_thoughts_are_hidden_from_both_models(stage: Stage, sampler: object) -> None:
    rewards, *_ = play(make(sampler), [f"<think>my profile says soup</think>{text}" for text in SAID])
    assert rewards == pytest.approx([0.0, 0.0, 0.44])
    assert stage.scored == [list(SAID)]
    assert "my profile" not in str(stage.backend.history[0].messages)


def test_a_given_opening_is_the_users_first_turn(stage: Stage, sampler: object) -> None:
    env = make(sampler)
    env.reset(seed=5, options={"opening": SAID[0]})
    env.step(SAID[1])
    *_, info = env.step(SAID[2])
    assert info["utterance_rewards"] == pytest.approx([0.52, 0.42, 0.38])


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_the_weights_are_the_expressions(stage: Stage, sampler: object, lam: float) -> None:
    env = DialogueEnv(assistant(), sampler, f"{lam}*cycle + {1 - lam}*human", "user", population="uniform", max_turns=3)
    rewards, info, _ = play(env)
    assert rewards[-1] == pytest.approx(lam * 0.4 + (1 - lam) * 0.6)
    assert info["utterance_rewards"] == pytest.approx([lam * 0.4 + (1 - lam) * human for human in (1.0, 0.5, 0.3)])


# ── many at a time ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["terminal", "dense"])
def test_one_call_of_each_model_for_all_lanes(stage: Stage, sampler: object, mode: str) -> None:
    settings = {"population": "uniform", "max_turns": 3, "reward_mode": mode, "autoreset_mode": "Disabled"}
    envs = DialogueVectorEnv(8, assistant(), sampler, REWARD, "user", **settings)
    envs.reset(seed=5)
    total = np.zeros(8)
    for text in SAID:
        _, rewards, _, _, infos = envs.step([text] * 8)
        total += rewards
    np.testing.assert_allclose(total, 0.44)
    scored = 1 if mode == "terminal" else 3
    assert stage.calls == ([8] * scored, scored, scored)
    assert all(row == pytest.approx([0.52, 0.42, 0.38]) for row in infos["utterance_rewards"])


def test_lanes_are_single_environments(stage: Stage, sampler: object) -> None:
    # Each person's generated profile depends on what was said, so that lanes that are mixed up show.
    stage.reply = lambda request: f"{OF if 'one' in str(request.messages) else OTHER}\n\n{SC}"
    stage.score = lambda text: 0.5
    envs = DialogueVectorEnv(3, assistant(), sampler, REWARD, "user", population="uniform", max_turns=1)
    envs.reset(seed=5)
    *_, infos = envs.step(["one", "two", "one"])
    alone = [play(make(sampler, max_turns=1), [text])[1]["utterance_rewards"] for text in ("one", "two")]
    final = infos["final_info"]["utterance_rewards"]
    assert [final[0], final[1], final[2]] == [alone[0], alone[1], alone[0]]
    assert alone == [pytest.approx([0.42]), pytest.approx([0.26])]  # .8·.4 + .1; .8·½(.2 + .2) + .1


def test_async(stage: Stage, sampler: object) -> None:
    async def talk() -> list[float]:
        dialogue = usp_env.AsyncDialogue(assistant(), sampler, REWARD, "user", population="uniform", max_turns=3)
        await dialogue.reset(seed=5)
        return [(await dialogue.step(text))[1] for text in SAID]

    assert asyncio.run(talk()) == pytest.approx([0.0, 0.0, 0.44])


def test_the_registered_ids(stage: Stage) -> None:
    env = gym.make("usp_env/User-v0", assistant="scripted", max_turns=3)
    assert play(env)[0] == pytest.approx([0.0, 0.0, 0.44])
    envs = gym.make_vec("usp_env/User-v0", num_envs=2, assistant="scripted", max_turns=1)
    envs.reset(seed=5)
    np.testing.assert_allclose(envs.step([SAID[0]] * 2)[1], 0.52)


# ── what fails ───────────────────────────────────────────────────────────────────────────────────


def lanes(sampler: object) -> DialogueVectorEnv:
    settings = {"population": "uniform", "max_turns": 1, "autoreset_mode": "Disabled"}
    envs = DialogueVectorEnv(3, assistant(), sampler, REWARD, "user", **settings)
    envs.reset(seed=5)
    return envs


def test_a_failed_generation_loses_its_lane_alone(stage: Stage, sampler: object) -> None:
    stage.reply = lambda request: BackendError("502") if SAID[1] in str(request.messages) else f"{OF}\n\n{SC}"
    _, rewards, terminated, truncated, infos = lanes(sampler).step(list(SAID))
    np.testing.assert_allclose(rewards, [0.52, 0.0, 0.38])
    assert (list(terminated), list(truncated)) == ([False] * 3, [True] * 3)
    assert list(infos["outcome"]) == ["completed", "infra_failure", "completed"]
    assert list(infos["end_reason"]) == ["turn_limit", "infra", "turn_limit"]
    assert list(infos["valid"]) == [True, False, True]
    assert infos["reward_terms"][1] == {}
    assert infos["utterance_rewards"][1] == [0.0]


@pytest.mark.parametrize("model", ["generator", "scorer"])
def test_a_model_that_is_down_fails_the_batch(stage: Stage, sampler: object, model: str) -> None:
    def down(*_: object) -> Any:
        raise BackendError("device lost")

    if model == "generator":
        stage.reply = down
    else:
        stage.score = down
    _, rewards, _, truncated, infos = lanes(sampler).step(list(SAID))
    assert (list(rewards), list(truncated)) == ([0.0] * 3, [True] * 3)
    assert list(infos["outcome"]) == ["infra_failure"] * 3
    assert not infos["valid"].any()


def test_a_profile_that_cannot_be_read_is_unscored(stage: Stage, sampler: object) -> None:
    stage.reply = lambda request: "I am sorry." if SAID[1] in str(request.messages) else f"{OF}\n\n{SC}"
    _, rewards, terminated, truncated, infos = lanes(sampler).step([SAID[0], SAID[1], f"{SAID[2]} {END}"])
    np.testing.assert_allclose(rewards, [0.52, 0.0, 0.38])
    assert list(infos["outcome"]) == ["completed", "unscored", "completed"]
    assert list(infos["end_reason"]) == ["turn_limit", "turn_limit", "user_ended"]  # the episode's own
    assert (list(terminated), list(truncated)) == ([False, False, True], [True, True, False])
    assert list(infos["valid"]) == [True, False, True]
    assert (infos["reward_terms"][1], infos["utterance_rewards"][1]) == ({}, [0.0])


def test_an_unreadable_profile_on_the_way_pays_later(stage: Stage, sampler: object) -> None:
    stage.reply = lambda request: "?" if len(stage.backend.history) in (2, 3) else f"{OF}\n\n{SC}"
    rewards, info, _ = play(make(sampler, reward_mode="dense"))
    assert rewards == pytest.approx([0.52, 0.0, -0.08])  # Φ = .52, none, .44
    assert info["valid"]


def test_a_person_without_a_profile_is_unscored(stage: Stage, sampler: object) -> None:
    env = make(sampler, max_turns=1)
    env.reset(seed=5, options={"profile": Profile("nobody", "", "")})
    _, reward, _, _, info = env.step(SAID[0])
    assert (reward, info["outcome"], info["valid"]) == (0.0, "unscored", False)


@pytest.mark.parametrize("action", ["", "   ", "<think>hm</think>", "x" * 20_000])
def test_a_bad_action_asks_no_model(stage: Stage, sampler: object, action: str) -> None:
    rewards, info, _ = play(make(sampler, bad_action_reward=-1.0), [SAID[0], action])
    assert rewards == [0.0, -1.0]
    assert (info["outcome"], info["valid"], info["utterance_rewards"]) == ("agent_failure", True, [0.0, -1.0])
    assert stage.calls == ([], 0, 0)


def test_a_partner_that_fails_asks_no_model(stage: Stage, sampler: object) -> None:
    mute = Speaker(lambda view, seed: "", role="assistant")
    env = DialogueEnv(mute, sampler, REWARD, "user", population="uniform", max_turns=3)
    rewards, info, _ = play(env, SAID[:1])
    assert (rewards, info["outcome"], info["valid"]) == ([0.0], "assistant_failure", False)
    assert stage.calls == ([], 0, 0)


def test_a_bug_in_a_scorer_is_told_with_its_episode(stage: Stage, sampler: object) -> None:
    def bug(text: str) -> float:
        raise ZeroDivisionError("mine")

    stage.score = bug
    env = make(sampler, max_turns=1)
    env.reset(seed=5)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        env.step(SAID[0])
    assert "while scoring episode" in "".join(caught.value.__notes__)
