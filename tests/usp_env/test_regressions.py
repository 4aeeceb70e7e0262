"""One test for each defect that a review found; the name says what must not come back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from doubles import Speaker

from usp_env.backends.base import Generation
from usp_env.dialogue import END, strip_think
from usp_env.env import DialogueEnv, make_conductor, make_specs
from usp_env.episode import Episode
from usp_env.errors import BackendError, CallOrderError, SpecError
from usp_env.profiles import Profile, ProfileBank
from usp_env.records import EpisodeSpec, Reply, RewardTerms, Rules
from usp_env.replay import go_on, replay
from usp_env.rollout import plan, take
from usp_env.sampling.base import Draw, UniformSampler
from usp_env.transcripts import read_transcripts
from usp_env.vector import DialogueVectorEnv

KW = {"population": "uniform"}
USER = Speaker(lambda view, seed: f"q{seed % 9973}")
PROFILE = Profile("a", "You cook.", "Terse.")


def test_records_with_token_ids_replay_from_disk(sampler: object, tmp_path: object) -> None:
    user = Speaker(lambda view, seed: Reply("hi", generation=Generation("hi", (1, 2), (-0.5, -0.1))))
    env = DialogueEnv(user, sampler, None, max_turns=1, record=tmp_path / "run", **KW)
    env.reset(seed=0)
    env.step("yes?")
    (transcript,) = read_transcripts(tmp_path / "run")
    assert transcript.messages[0]["token_ids"] == [1, 2]
    assert replay(transcript).messages[0].token_ids == (1, 2)


def test_going_on_keeps_the_profiles_attributes(tmp_path: object) -> None:
    bank = ProfileBank([dataclasses.replace(PROFILE, attributes={"objective_facts": {"scenarios": []}})])
    env = DialogueEnv(USER, UniformSampler(bank), None, max_turns=3, record=tmp_path / "run", **KW)
    env.reset(seed=0)
    for _ in range(3):
        env.step("ok")
    (transcript,) = read_transcripts(tmp_path / "run")
    assert go_on(transcript, 2, env.conductor.rules, bank[0]).profile.attributes == bank[0].attributes
    assert go_on(transcript, 2, env.conductor.rules).profile.attributes is None


def test_an_opening_that_does_not_fit_is_no_episode(sampler: object) -> None:
    user = Speaker(lambda view, seed: Reply("", generation=Generation("", finish_reason="context_limit")))
    envs = DialogueVectorEnv(1, user, sampler, None, **KW)
    envs.reset(seed=0)
    *_, infos = envs.step(["x"])
    assert infos["final_info"]["outcome"][0] == "infra_failure"
    assert not infos["final_info"]["valid"][0]
    with pytest.raises(BackendError, match="does not fit"):
        DialogueEnv(user, sampler, None, **KW).reset(seed=0)


def test_a_reply_ends_by_its_flag_alone() -> None:
    def fresh() -> Episode:
        episode = Episode(EpisodeSpec("a", "uniform", 1), PROFILE, Rules(agent_role="user"))
        episode.begin()
        return episode

    quoting = fresh()
    take(quoting, Reply(f"What does this mean: {END}"))
    assert (quoting.end_reason, quoting.messages[0].content) == (None, f"What does this mean: {END}")
    ending = fresh()
    take(ending, Reply("bye", ended=True))
    assert (ending.end_reason, ending.messages[0].content) == ("user_ended", "bye")
    marked = fresh()
    marked.act(f"bye {END}")
    assert (marked.end_reason, marked.messages[0].content) == ("user_ended", "bye")


def test_a_fork_of_an_ended_lane_has_ended(sampler: object, tmp_path: object) -> None:
    envs = DialogueVectorEnv(1, USER, sampler, None, autoreset_mode="Disabled", max_turns=1, record=tmp_path / "run", **KW)
    envs.reset(seed=0)
    envs.step(["x"])
    with pytest.raises(CallOrderError, match="ended"):
        envs.fork(0, 2).step(["y", "y"])
    assert len(read_transcripts(tmp_path / "run")) == 1


def test_vector_restore_checks_seat_and_lane(sampler: object) -> None:
    other = DialogueEnv(Speaker(lambda view, seed: "yes", "assistant"), sampler, None, "user", **KW)
    other.reset(seed=0)
    envs = DialogueVectorEnv(1, USER, sampler, None, **KW)
    envs.reset(seed=0)
    before = envs.step(["x"])[0]
    with pytest.raises(SpecError, match="seat"):
        envs.restore(0, other.snapshot())
    with pytest.raises(SpecError, match="lane"):
        envs.restore(3, envs.snapshot(0))
    assert envs._observations() == before


def test_forks_that_do_not_diverge_stay_together_after_their_end(sampler: object) -> None:
    envs = DialogueVectorEnv(1, USER, sampler, None, max_turns=1, **KW)
    envs.reset(seed=0)
    child = envs.fork(0, 1, diverge=False)
    assert envs.step(["x"])[4]["episode_seed"] == child.step(["x"])[4]["episode_seed"]


def test_a_last_step_without_an_utterance_pays_the_last_one() -> None:
    episode = Episode(EpisodeSpec("a", "uniform", 1, "hi"), PROFILE, Rules(scoring="end"))
    episode.begin()
    episode.act("a")
    episode.feed(Reply("more"))
    episode.stop("context_limit")
    episode.feed(RewardTerms(dialogue={"g": 1.0}))
    assert (episode.rewards, episode.utterance_rewards) == ([0.0, 1.0], [1.0])


def test_specs_carry_the_samplers_options(bank: ProfileBank) -> None:
    class Patient(UniformSampler):
        def draw(self, n: int, population: str, rng: np.random.Generator) -> list[Draw]:
            return [Draw(d.profile, d.population, {"patience": 3}) for d in super().draw(n, population, rng)]

    sampler, seen = Patient(bank), []

    def answer(view: object, seed: int) -> str:
        seen.append(dict(view.options))
        return f"q{seed % 97}"

    env = DialogueEnv(Speaker(answer), sampler, None, **KW)
    env.reset(seed=0)
    env.reset(options={"episode": env.episode.spec})
    for spec in (*plan(sampler, ["uniform"], 1, 0), *make_specs(1, "uniform", 0, sampler)):
        env.reset(options={"episode": spec})
        hash(spec)
    assert seen == [{"patience": 3}] * 4
    with pytest.raises(SpecError, match="user_options"):
        env.reset(options={"episode": EpisodeSpec("p0", "uniform", 1, None, 5)})


def test_script_lines_with_outer_blanks_replay(sampler: object, tmp_path: object) -> None:
    env = DialogueEnv(Speaker(lambda view, seed: " hi " if view.opening else "bye "), sampler, None, max_turns=2,
                      record=tmp_path / "run", **KW)  # fmt: skip
    env.reset(seed=0)
    env.step("x")
    env.step("y")
    assert replay(read_transcripts(tmp_path / "run")[0]).messages[0].raw == " hi "


def test_a_restored_episode_is_scored_as_its_environment_scores(sampler: object) -> None:
    plain = DialogueEnv(USER, sampler, None, max_turns=1, **KW)
    paying = DialogueEnv(USER, sampler, lambda profile, dialogue: 1.0, max_turns=1, **KW)
    plain.reset(seed=0)
    paying.restore(plain.snapshot())
    assert paying.step("x")[1] == 1.0


def test_forks_have_spaces_of_their_own(sampler: object) -> None:
    env = DialogueEnv(USER, sampler, None, **KW)
    env.reset(seed=0)
    env.action_space.seed(0)
    child = env.fork(1)[0]
    first = child.action_space.sample()
    assert env.action_space.sample() == first  # the same state, not the same generator


def test_a_wrong_feed_loses_nothing() -> None:
    episode = Episode(EpisodeSpec("a", "uniform", 1), PROFILE, Rules())
    episode.begin()
    with pytest.raises(CallOrderError, match="RewardTerms was fed"):
        episode.feed(RewardTerms())
    episode.feed(Reply("hi"))
    assert episode.turn == 1


def test_an_opening_leaves_the_user_agent_a_turn(sampler: object) -> None:
    conductor = make_conductor(Speaker(lambda view, seed: "yes", "assistant"), sampler, None, "user", max_turns=1, **KW)
    with pytest.raises(SpecError, match="max_turns=1"):
        conductor.new_episode(np.random.default_rng(0), {"opening": "hi"})


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("hm</think> Paris.", "Paris."),
        ("hm</think><think>more</think> Paris.", "Paris."),
        ("<think>a</think>b<think>c", "b"),
        ("no thoughts", "no thoughts"),
    ],
)
def test_thoughts_that_began_in_the_header_are_hidden(text: str, left: str) -> None:
    assert strip_think(text) == left
