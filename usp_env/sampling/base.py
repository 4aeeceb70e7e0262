"""The `Sampler` protocol: who is the next user?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from usp_env.errors import UnknownNameError
from usp_env.profiles import Profile, ProfileBank


@dataclass(frozen=True, slots=True)
class Draw:
    """One drawn user.

    Args:
        profile: Who it is.
        population: The population it was drawn from.
        user_options: Handed to the simulated user (e.g. a patience); hidden from the agent.
    """

    profile: Profile
    population: str
    user_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """What a sampler learns of one finished, valid episode.

    Args:
        profile_id: Whose episode it was.
        population: The population it was drawn from.
        turns: User utterances.
        episode_return: Sum of the step rewards.
        end_reason: Why it ended.
        outcome: See `usp_env.episode`.
    """

    profile_id: str
    population: str
    turns: int
    episode_return: float
    end_reason: str
    outcome: str


@runtime_checkable
class Sampler(Protocol):
    """Draws users; may adapt to how episodes went. Any class with these members is one.

    Attributes:
        bank: Where profile ids are looked up.
        populations: Names that `draw` takes.

    Example:
        Mass shifts to the people with whom episodes go badly:

        >>> class HarderPeople:
        ...     populations = ("hard",)
        ...     def __init__(self, bank):
        ...         self.bank, self.losses = bank, {profile.id: 0.0 for profile in bank}
        ...     def draw(self, n, population, rng):
        ...         weights = np.exp([self.losses[profile.id] for profile in self.bank])
        ...         chosen = rng.choice(len(self.bank), size=n, p=weights / weights.sum())
        ...         return [Draw(self.bank[int(i)], population) for i in chosen]
        ...     def observe(self, summaries):
        ...         self.losses.update({summary.profile_id: -summary.episode_return for summary in summaries})
        ...     def state_dict(self):
        ...         return {"losses": self.losses}
        ...     def load_state_dict(self, state):
        ...         self.losses = dict(state["losses"])
        >>> sampler = HarderPeople(ProfileBank([Profile("a", "You cook.", "You hum."), Profile("b", "You sew.", "You hum.")]))
        >>> sampler.observe([EpisodeSummary("b", "hard", 3, episode_return=-9.0, end_reason="user_ended", outcome="completed")])
        >>> {draw.profile.id for draw in sampler.draw(20, "hard", np.random.default_rng(0))}, isinstance(sampler, Sampler)
        ({'b'}, True)
    """

    @property
    def bank(self) -> ProfileBank: ...  # noqa: D102 - see Attributes

    @property
    def populations(self) -> Sequence[str]: ...  # noqa: D102

    def draw(self, n: int, population: str, rng: np.random.Generator) -> list[Draw]:
        """Draw `n` users of a population; all randomness comes from `rng`."""
        ...

    def observe(self, summaries: Sequence[EpisodeSummary]) -> None:
        """Take note of finished valid episodes, each once, in the order of their environments. May do nothing."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state, for checkpoints."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        ...


class UniformSampler:
    """Every profile of a bank equally often: for banks too small to have a density.

    Args:
        bank: Any number of profiles.

    Example:
        >>> bank = ProfileBank([Profile("a", "You cook.", "You are brief.")])
        >>> UniformSampler(bank).draw(2, "uniform", np.random.default_rng(0))[1].profile.id
        'a'
    """

    populations: Sequence[str] = ("uniform",)

    def __init__(self, bank: ProfileBank) -> None:
        self.bank = bank

    def draw(self, n: int, population: str, rng: np.random.Generator) -> list[Draw]:
        """Draw `n` profiles with replacement."""
        if population not in self.populations:
            raise UnknownNameError("population", population, self.populations)
        return [Draw(self.bank[int(index)], population) for index in rng.integers(len(self.bank), size=n)]

    def observe(self, summaries: Sequence[EpisodeSummary]) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
