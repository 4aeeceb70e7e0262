"""Dialogues for a trainer: who is played at which step, and what each dialogue gives to learn from.

pool  = virtual_pool(sampler, seed)                  # paper §4.4, B.1: the least familiar combinations of two people
specs = specs_of(pool, step=3, n=32, seed=0)         # the same whatever was played before
play  = roll_out(conductor, speaker, specs)
play.rows, play.credit, play.outcomes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agents.rows import Row
from agents.speaker import TokenSpeaker
from training.run_log import Clock
from usp_env.driver import Conductor
from usp_env.episode import Episode
from usp_env.errors import SpecError, UspError
from usp_env.profiles import Profile, ProfileBank
from usp_env.records import EpisodeSpec
from usp_env.rollout import roll
from usp_env.sampling.base import UniformSampler
from usp_env.sampling.density import DensitySampler
from usp_env.sampling.novelty import build_pool


@dataclass(frozen=True, slots=True)
class Play:
    """A rollout.

    Args:
        episodes: All of them, in the order of their specs.
        rows: Of the dialogues that may be learnt from.
        credit: Of each row, one r_k for each utterance.
        outcomes: Outcome to the number of episodes.
    """

    episodes: Sequence[Episode]
    rows: Sequence[Row]
    credit: Sequence[Sequence[float]]
    outcomes: Mapping[str, int]

    @property
    def scored(self) -> list[Episode]:
        """Episodes with a reward."""
        return [episode for episode in self.episodes if episode.outcome == "completed"]


def virtual_pool(sampler: DensitySampler, seed: int, n: int = 1000, size: int = 5000, **options: Any) -> list[Profile]:
    """The novelty pool in a random order.

    Raises:
        SpecError: The bank gives fewer than `size` combinations.
    """
    rng = np.random.default_rng([seed, 1])
    pool = build_pool(sampler, rng, n=n, size=size, **options)
    return [pool[i] for i in rng.permutation(len(pool))]


def real_people(sampler: DensitySampler, seed: int, size: int = 5000) -> list[Profile]:
    """People of the bank by their density: the ablation without virtual profiles."""
    return sampler.sample(size, "density", np.random.default_rng([seed, 1]))


def people_of(bank: str, split: str) -> UniformSampler:
    """Everyone of a split, whom no density is asked of; of a bank without splits everyone.

    Raises:
        UnknownNameError: The bank has splits, but not this one.
    """
    everyone = ProfileBank.load(bank)
    return UniformSampler(everyone.subset(split) if any(profile.split for profile in everyone) else everyone)


def specs_of(pool: Sequence[Profile], step: int, n: int, seed: int, population: str = "virtual") -> list[EpisodeSpec]:
    """The `n` episodes of a step: the pool is gone through from its beginning, again and again, each time with new noise."""
    if not pool:
        raise SpecError("expected a pool of at least one profile, got none")
    made = []
    for k in range(step * n, (step + 1) * n):
        noise = int(np.random.default_rng([seed, 2, k]).integers(2**53))
        made.append(EpisodeSpec(pool[k % len(pool)].id, population, noise))
    return made


def late(conductor: Conductor) -> Conductor:
    """A conductor whose episodes are not scored where they end; `score` does it."""
    conductor.rules = replace(conductor.rules, scoring="never")
    return conductor


def roll_out(
    conductor: Conductor, speaker: TokenSpeaker, specs: Sequence[EpisodeSpec], lanes: int = 64, clock: Clock | None = None
) -> Play:
    """Play these episodes to their ends and gather what may be learnt from them.

    `usp_env.rollout.roll` and not `DialogueVectorEnv`, over the same conductor: a vector environment begins another episode in a
    lane that has ended, but a rollout is over with its last episode, and none may be carried into the next step's weights.
    """
    clock = clock or Clock()
    order = {spec.episode_seed: k for k, spec in enumerate(specs)}
    episodes = sorted(roll(conductor, speaker, specs, lanes), key=lambda episode: order[episode.spec.episode_seed])
    clock.lap("rollout_seconds")
    score(conductor, episodes)
    clock.lap("reward_seconds")
    found = [pair for episode in episodes if (pair := learnable(episode, speaker)) is not None]
    speaker.forget()
    outcomes = Counter(str(episode.outcome) for episode in episodes)
    return Play(episodes, [row for row, _ in found], [credit for _, credit in found], outcomes)


def score(conductor: Conductor, episodes: Sequence[Episode]) -> None:
    """Score what was completed without a score, all of it in one call: a generator reads 32 dialogues in the time of four."""
    unscored = [episode for episode in episodes if episode.outcome == "completed" and not episode.reward_terms]
    for episode in unscored:
        episode.ask_score()
    conductor.run(unscored)


def learnable(episode: Episode, speaker: TokenSpeaker) -> tuple[Row, list[float]] | None:
    """A finished episode's row and the credit of its utterances; None where nothing may be learnt from it.

    Eq. 6 gives r_k to utterances. An end without words is no utterance: its token gets their mean, what the dialogue is worth, so
    that ending is neither paid nor punished by itself. An utterance that cannot be taken (empty, too long) gets the reward of
    bad actions, and is then the only one that is trained: what was said before it was never scored.
    """
    if not episode.valid:
        return None
    row, credit = speaker.row(episode), list(episode.utterance_rewards)
    if not row.utterances:
        return None
    if episode.outcome == "agent_failure":
        said = sum(m.role == speaker.role and m.token_ids is not None for m in episode.messages)
        return (row.only_last(), credit[-1:]) if row.utterances > said else None  # nothing was sampled: a prompt too long
    if episode.messages[0].role == speaker.role and episode.messages[0].token_ids is None:
        credit = credit[1:]  # a given opening is not the policy's
    if row.utterances == len(credit) + 1:
        credit.append(float(np.mean(credit)) if credit else 0.0)
    if row.utterances != len(credit):
        raise UspError(f"episode {episode.id}: {row.utterances} utterances were sampled and {len(credit)} have a reward")
    return row, credit
