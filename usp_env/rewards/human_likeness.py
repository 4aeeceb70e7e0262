"""Human-likeness: the probability that a person, not an assistant, wrote each user utterance.

The paper trains a detector on user against assistant turns and rewards P(human) of every utterance by itself, without its
context; in Eq. 6 it is the part of the credit that tells utterance from utterance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.models import hub, scorers
from usp_env.profiles import Profile
from usp_env.records import RewardTerms
from usp_env.rewards.base import When

SCORER = "human-v1"


class TextScorer(Protocol):
    """Judges texts."""

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[Any]:
        """P(human) of `n` texts: (n,), in [0, 1].

        Raises:
            BackendError: A remote scorer failed after its retries.
        """
        ...


@dataclass(frozen=True)
class HumanLikeness:
    """The reward `human`: a vector over the user's utterances, shape (K,).

    In the user's seat it judges the agent; in the assistant's seat, or over saved transcripts, the simulated user.

    Args:
        scorer: A name (`usp_env.models.scorers.load`), a folder or hub id of a classifier (`usp_env.models.hub.detector`), or an
            object; None is the packaged one.

    Example:
        >>> human = HumanLikeness(lambda texts: np.array([float(text.islower()) for text in texts]))
        >>> said = [("user", "hey can u help"), ("assistant", "Certainly!"), ("user", "Great! I appreciate it.")]
        >>> talk = Dialogue.of({"role": role, "content": text} for role, text in said)
        >>> human([Profile("a", "You cook.", "You are terse.")], [talk])[0].utterance
        {'human': array([1., 0.])}
    """

    scorer: TextScorer | str | None = None
    name: str = "human"
    when: When = "end"

    def __post_init__(self) -> None:
        self._live()  # what is missing should be told when the reward is made, not at the first end

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the value besides the dialogue."""
        scorer = self._live()
        return {"scorer": getattr(scorer, "name", type(scorer).__name__)}

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | None]:
        """The term `human` of each dialogue, from one call of the scorer for them all; None where the user said nothing."""
        said = [dialogue.utterances("user") for dialogue in dialogues]
        texts = [text for own in said for text in own]
        values = probabilities(self._live()(texts), len(texts), self.name) if texts else np.zeros(0)
        return by_dialogue(self.name, values, [len(own) for own in said])

    def _live(self) -> TextScorer:
        # A scorer given by name stays a name here: environments copy and pickle their settings.
        if not isinstance(self.scorer, str | None):
            return self.scorer
        name = self.scorer or SCORER
        return hub.detector(name) if hub.names_checkpoint(name) else scorers.load(name)


def by_dialogue(name: str, values: npt.NDArray[np.float64], lengths: Sequence[int]) -> list[RewardTerms | None]:
    """A flat vector over all utterances as one term per dialogue; None for a dialogue of length 0.

    Example:
        >>> [terms and terms.utterance["p"].tolist() for terms in by_dialogue("p", np.array([0.1, 0.2, 0.3]), [2, 0, 1])]
        [[0.1, 0.2], None, [0.3]]
    """
    ends = np.cumsum(lengths)
    return [
        RewardTerms({name: values[end - length : end]}) if length else None for end, length in zip(ends, lengths, strict=True)
    ]


def probabilities(values: Any, n: int, name: str) -> npt.NDArray[np.float64]:
    """What a scorer returned, as (n,) float64.

    Raises:
        SpecError: Another shape, or a value outside of [0, 1].
    """
    array: npt.NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if array.shape != (n,) or not np.all((array >= 0) & (array <= 1)):
        raise SpecError(
            f"reward {name!r}: expected a scorer that gives {n} values in [0, 1], got {array!r:.120} of {array.shape}"
        )
    return array
