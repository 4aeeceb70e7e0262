"""A sampler that subclasses nothing but follows the protocol, and shifts mass to the people who go badly."""

from __future__ import annotations

import json

import numpy as np

from usp_env.profiles import ProfileBank
from usp_env.sampling import Draw, EpisodeSummary, Sampler


class HarderPeople:
    """Draws a profile with p proportional to exp(-mean return): a toy of prioritised replay."""

    populations = ("hard",)

    def __init__(self, bank: ProfileBank) -> None:
        self.bank = bank
        self.returns = {profile.id: [0.0] for profile in bank}

    def draw(self, n, population, rng):
        weights = np.exp([-np.mean(self.returns[profile.id]) for profile in self.bank])
        return [Draw(self.bank[int(i)], population) for i in rng.choice(len(self.bank), size=n, p=weights / weights.sum())]

    def observe(self, summaries):
        for summary in summaries:
            self.returns[summary.profile_id].append(summary.episode_return)

    def state_dict(self):
        return {"returns": self.returns}

    def load_state_dict(self, state):
        self.returns = {profile_id: list(values) for profile_id, values in state["returns"].items()}


def summary(profile_id: str, episode_return: float) -> EpisodeSummary:
    return EpisodeSummary(profile_id, "hard", 3, episode_return, "user_ended", "completed")


def test_observe_shifts_mass_and_the_state_carries_it(make_bank):
    sampler = HarderPeople(make_bank(10))
    assert isinstance(sampler, Sampler)
    hardest = sampler.bank[3].id

    def share(s):
        return np.mean([d.profile.id == hardest for d in s.draw(1000, "hard", np.random.default_rng(0))])

    assert share(sampler) < 0.15
    sampler.observe([summary(hardest, -8.0)])  # mean of 0 and -8: weight e^4 against nine of 1: 54.6 / 63.6 = .86
    assert abs(share(sampler) - 0.86) < 0.03
    fresh = HarderPeople(make_bank(10))
    fresh.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert share(fresh) == share(sampler)
