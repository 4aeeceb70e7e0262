"""What is evaluated, and how: users, people, levels, seeds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.evaluation.card import LEVELS, Level
from usp_env.evaluation.people import Person
from usp_env.sampling.density import DensitySampler
from usp_env.users.base import Partner


@dataclass(frozen=True, slots=True)
class Candidate:
    """A simulated user to be evaluated.

    Args:
        name: Its row on the card: the spec it was asked for by.
        speaker: It.
        given: Whether it is given the profile; else it is given the person's first turn in conversations.
    """

    name: str
    speaker: Partner
    given: bool = True

    @property
    def slug(self) -> str:
        """Its folder."""
        bare = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.")[:48]
        return f"{bare}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is evaluated, and how.

    Args:
        bank: Its name.
        split: Of the bank.
        people: Whom the users play.
        everyone: All of the split, in the order of `people`: ADV's plane is fitted on them.
        neighbours: Person to the conversation of their topical neighbour; empty: that row is left out.
        levels: Some of `LEVELS`.
        seeds: Of the generations.
        turns: Most user turns of a conversation.
        most: Most turns of a person at the utterance level; None: all.
        paper: The paper's ADV, and given first turns count as the user's own.
        lanes: Most generations at a time.
        sampler: Fitted on the split, for the map of the card; None: no map.
    """

    bank: str
    split: str
    people: Sequence[Person]
    everyone: Sequence[Person]
    neighbours: Mapping[str, Dialogue]
    levels: Sequence[Level] = LEVELS
    seeds: Sequence[int] = (0,)
    turns: int = 10
    most: int | None = None
    paper: bool = False
    lanes: int = 16
    sampler: DensitySampler | None = None

    def __post_init__(self) -> None:
        if not self.people or not self.seeds or not self.levels or not set(self.levels) <= set(LEVELS):
            raise SpecError(f"expected people, seeds and levels of {', '.join(LEVELS)}, got {self.levels!r}")

    @property
    def protocol(self) -> str:
        """For the card."""
        return "paper" if self.paper else "ours"
