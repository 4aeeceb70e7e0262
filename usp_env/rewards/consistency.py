"""Prompt-to-line consistency: the probability that the profile supports what the user says, utterance by utterance.

After Abdulhai et al., "Consistently Simulating Human Personas with Multi-Turn Reinforcement Learning" (2025), whose
prompt-to-line consistency is the share of lines that do not contradict the prompt, by a judge; here a trained verifier gives
each line a probability, and the mean over the lines is the dialogue's value.

It is the precision of a user: one who repeats a single safe line from the profile scores well. `cycle` asks for the recall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue
from usp_env.models import hub, scorers
from usp_env.profiles import Profile
from usp_env.records import RewardTerms
from usp_env.rewards.base import When
from usp_env.rewards.human_likeness import by_dialogue, probabilities

VERIFIER = "facts-v1"


class Verifier(Protocol):
    """Judges pairs of a profile and a user turn; `usp_env.models.scorers.FactVerifier` is one."""

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> npt.NDArray[Any]:
        """p(the profile supports the turn) of `n` pairs: (n,), in [0, 1].

        Raises:
            BackendError: A remote verifier failed after its retries.
        """
        ...


@dataclass(frozen=True)
class PromptToLine:
    """The reward `consistency`: a vector over the user's utterances, shape (K,).

    In the user's seat it judges the agent; in the assistant's seat, or over saved transcripts, the simulated user.

    Args:
        verifier: A name (`usp_env.models.scorers.load`), a folder or hub id of an NLI model (`usp_env.models.hub.verifier`), or
            an object; None is the packaged one.

    Example:
        >>> class SharesAWord:
        ...     def explains(self, profiles, turns):
        ...         return np.array([float(bool(set(p.split()) & set(t.split()))) for p, t in zip(profiles, turns)])
        >>> talk = Dialogue.of([{"role": "user", "content": "i cook"}, {"role": "assistant", "content": "You do."}])
        >>> PromptToLine(SharesAWord())([Profile("a", "You cook .", "You are terse.")], [talk])[0].utterance
        {'consistency': array([1.])}
    """

    verifier: Verifier | str | None = None
    name: str = "consistency"
    when: When = "end"

    def __post_init__(self) -> None:
        self._live()  # what is missing should be told when the reward is made, not at the first end

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the value besides profile and dialogue."""
        verifier = self._live()
        return {"verifier": getattr(verifier, "name", type(verifier).__name__)}

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | None]:
        """The term `consistency` of each dialogue, from one call of the verifier for them all.

        None where the user said nothing, or the profile is blank.
        """
        said = [d.utterances("user") if str(p).strip() else [] for p, d in zip(profiles, dialogues, strict=True)]
        pairs = [(str(profile), text) for profile, own in zip(profiles, said, strict=True) for text in own]
        values = np.zeros(0)
        if pairs:
            judged = self._live().explains([prose for prose, _ in pairs], [text for _, text in pairs])
            values = probabilities(judged, len(pairs), self.name)
        return by_dialogue(self.name, values, [len(own) for own in said])

    def _live(self) -> Verifier:
        # A verifier given by name stays a name here: environments copy and pickle their settings.
        if not isinstance(self.verifier, str | None):
            return self.verifier
        name = self.verifier or VERIFIER
        return hub.verifier(name) if hub.names_checkpoint(name) else scorers.load(name)
