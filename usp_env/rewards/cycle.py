"""Cycle consistency: does what the simulated user said give back the profile it was given (paper Eq. 5)?

    profile (OF, SC) ──user plays──▶ dialogue ──generator, USER turns alone──▶ (OF', SC')

    cc = ½ [cos(E(OF), E(OF')) + cos(E(SC), E(SC'))]        in [−1, 1]

The released code adds the two cosines without the half, and doubles the human-likeness term to match; in `0.8*cycle+0.2*human`
there is no factor 2 anywhere: utterance k's credit is Eq. 6, r_k = .8·cc + .2·human_k.

A dialogue that cannot be scored is None (the episode is `unscored`, not valid): the user said nothing, half of the given
profile is blank, or the generator wrote no two paragraphs. The last is a fault of the judge, not of the user: a cc of 0 would
teach the user to avoid whatever confuses the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError
from usp_env.extraction import generator as generators
from usp_env.extraction.generator import ProfileTexts
from usp_env.models import embedders
from usp_env.profiles import Profile
from usp_env.records import RewardTerms
from usp_env.rewards.base import When

Embed = Callable[[Sequence[str]], npt.NDArray[Any]]


class Generator(Protocol):
    """Reads profiles out of dialogues; `ProfileGenerator` is one."""

    def generate(self, dialogues: Sequence[Dialogue]) -> Sequence[ProfileTexts | BackendError | None]:
        """One profile per dialogue; None where none could be read, a `BackendError` where that one call failed.

        Raises:
            BackendError: Nothing of the batch could be done.
        """
        ...


@dataclass(frozen=True)
class CycleConsistency:
    """The reward `cycle`; see the module's docstring.

    In the user's seat it judges the agent; in the assistant's seat, or over saved transcripts, the simulated user.

    Args:
        generator: A spec (`usp_env.extraction.generator.load_generator`) or an object; None is the packaged one. Another one gets
            a name in expressions by `register_reward("cycle_8b", CycleConsistency("wangkevin02/Profile_Generator"))`.
        embedder: A name (`usp_env.models.embedders.load`) or texts to vectors, (n, d).

    Example:
        >>> class Reader:
        ...     def generate(self, dialogues):
        ...         return [ProfileTexts("You cook.", "You ramble.")] * len(dialogues)
        >>> axes = {"You cook.": [1, 0], "You are terse.": [0, 1], "You ramble.": [0.6, 0.8]}
        >>> cycle = CycleConsistency(Reader(), lambda texts: np.array([axes[text] for text in texts]))
        >>> talk = Dialogue.of([{"role": "user", "content": "soup?"}])
        >>> cycle([Profile("a", "You cook.", "You are terse.")], [talk])[0].dialogue
        {'cycle': 0.9}
    """

    generator: Generator | str | None = None
    embedder: Embed | str = "auto"
    name: str = "cycle"
    when: When = "end"

    def __post_init__(self) -> None:
        self._live()  # what is missing should be told when the reward is made, not at the first end

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the value besides profile and dialogue."""
        generator, embed = self._live()
        return {
            "generator": getattr(generator, "identity", type(generator).__name__),
            "embedder": getattr(embed, "name", type(embed).__name__),
        }

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | BackendError | None]:
        """The term `cycle` of each dialogue, from one call of the generator and one of the embedder for them all.

        Returns:
            For each dialogue its term; None where it cannot be scored; the `BackendError` where its own call failed.

        Raises:
            BackendError: No profile of the batch could be generated.
        """
        generator, embed = self._live()
        rows = [i for i, (profile, dialogue) in enumerate(zip(profiles, dialogues, strict=True)) if _scorable(profile, dialogue)]
        read = generator.generate([dialogues[i] for i in rows]) if rows else []
        found: list[RewardTerms | BackendError | None] = [None] * len(dialogues)
        pairs: dict[int, tuple[Profile, ProfileTexts]] = {}
        for i, texts in zip(rows, read, strict=True):
            if isinstance(texts, BackendError):
                found[i] = texts
            elif texts is not None:
                pairs[i] = profiles[i], texts
        for i, cc in zip(pairs, cycle_consistency(list(pairs.values()), embed), strict=True):
            found[i] = RewardTerms(dialogue={self.name: float(cc)})
        return found

    def _live(self) -> tuple[Generator, Embed]:
        # What is given by name stays a name here: environments copy and pickle their settings.
        given = self.generator or generators.PACKAGED
        generator = generators.load_generator(given) if isinstance(given, str) else given
        return generator, embedders.load(self.embedder) if isinstance(self.embedder, str) else self.embedder


def cycle_consistency(pairs: Sequence[tuple[Profile, ProfileTexts]], embed: Embed) -> npt.NDArray[np.float64]:
    """Eq. 5 of `n` pairs of a given and a generated profile: (n,), in [−1, 1]; one call of the embedder.

    Raises:
        SpecError: The embedder returns another shape than (texts, d), or a vector without direction.
    """
    if not pairs:
        return np.zeros(0)
    halves = [
        (given, generated)
        for profile, texts in pairs
        for given, generated in ((profile.objective, texts.objective), (profile.subjective, texts.subjective))
    ]
    row = {text: k for k, text in enumerate(dict.fromkeys(text for pair in halves for text in pair))}
    vectors = _unit(np.asarray(embed(list(row)), dtype=np.float64), len(row))
    left, right = (vectors[[row[pair[side]] for pair in halves]] for side in (0, 1))
    # A text's vector differs by 1e-7 with what shares its batch; rounded, a reward is the same in 1 and 64 environments.
    cosines = np.round(np.einsum("nd,nd->n", left, right), 4)
    consistency: npt.NDArray[np.float64] = np.clip(cosines, -1.0, 1.0).reshape(-1, 2).mean(axis=1)
    return consistency


def _scorable(profile: Profile, dialogue: Dialogue) -> bool:
    said = any(text.strip() for text in dialogue.utterances("user"))
    return bool(said and profile.objective.strip() and profile.subjective.strip())


def _unit(vectors: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.float64]:
    if vectors.ndim != 2 or len(vectors) != n:
        raise SpecError(f"cycle: expected an embedder that gives {n} texts vectors of shape ({n}, d), got {vectors.shape}")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.all(np.isfinite(norms) & (norms > 0)):
        raise SpecError("cycle: expected an embedder whose vectors are finite and not zero, got one that is neither")
    unit: npt.NDArray[np.float64] = vectors / norms
    return unit
