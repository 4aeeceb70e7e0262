"""The typed records that pass between episodes, drivers, speakers and rewards. No behaviour beyond arithmetic."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from usp_env.backends.base import Generation
from usp_env.dialogue import Dialogue, Role, View
from usp_env.errors import BackendError, SpecError
from usp_env.profiles import Profile


@dataclass(frozen=True, slots=True)
class Reply:
    """What a simulated user or an assistant says.

    Args:
        text: The utterance as the other side reads it; empty when the speaker said nothing.
        ended: The speaker ended the conversation (only a user can). Set from the end token, never from text.
        generation: What the engine produced; None for scripted speakers.
        error: The call failed after its retries; `text` is then empty.
    """

    text: str
    ended: bool = False
    generation: Generation | None = None
    error: BackendError | None = None


@dataclass(frozen=True, slots=True)
class RewardTerms:
    """What a reward function found in one dialogue.

    Args:
        utterance: Name to one value per agent utterance, shape `(K,)`.
        dialogue: Name to one value for the whole dialogue.

    Example:
        >>> terms = RewardTerms({"human": np.array([0.2, 0.1])}, {"cycle": 0.4})
        >>> round(terms.value, 2), [round(r, 2) for r in terms.credit(2)]
        (0.55, [0.6, 0.5])
    """

    utterance: Mapping[str, np.ndarray] = field(default_factory=dict)
    dialogue: Mapping[str, float] = field(default_factory=dict)

    @property
    def flat(self) -> dict[str, float]:
        """Name to value, a vector's mean standing for it."""
        means = {name: float(np.mean(values)) if len(values) else 0.0 for name, values in self.utterance.items()}
        return means | {name: float(value) for name, value in self.dialogue.items()}

    @property
    def value(self) -> float:
        """The dialogue's scalar: Σ dialogue + Σ mean(utterance)."""
        return sum(self.flat.values())

    def credit(self, k: int) -> list[float]:
        """Credit of each of the `k` agent utterances: Σ dialogue + Σ utterance[k] (Eq. 6).

        Raises:
            SpecError: A vector does not have length `k`.
        """
        total = np.full(k, sum(map(float, self.dialogue.values())))
        for name, values in self.utterance.items():
            if len(values) != k:
                raise SpecError(f"reward term {name!r}: expected one value for each of {k} utterances, got {len(values)}")
            total = total + np.asarray(values, dtype=float)
        return [float(r) for r in total]


def counts(usage: Mapping[str, int]) -> dict[str, int]:
    """The part of an engine's usage that belongs to the episode; what its caches saved depends on what else it did."""
    return {key: usage[key] for key in ("prompt_tokens", "completion_tokens") if key in usage}


def check_seed(seed: object, name: str = "seed") -> int:
    """The seed as an `int`, or `SpecError` unless it is a whole number of at least 0."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise SpecError(f"{name}: expected a whole number of at least 0, got {seed!r:.80}")
    return int(seed)


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """Rebuilds one episode alone: who the user is, and all noise.

    Args:
        profile_id: In the sampler's bank; ids of virtual profiles name their donors.
        population: The population the profile was drawn from.
        episode_seed: Seeds every generation of the episode.
        opening: The user's first utterance, where it is given rather than generated.
        user_options: What the sampler gave to the simulated user.
    """

    profile_id: str
    population: str
    episode_seed: int
    opening: str | None = None
    user_options: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Rules:
    """How a conversation is conducted.

    Args:
        agent_role: The seat of the agent.
        max_turns: The episode is over after the assistant's reply to this user turn.
        token_budget: Most tokens said by both sides together (engine's counts; else 4 bytes a token), or None.
        max_chars: Most characters of an action.
        keep_think: The agent sees its own `<think>` blocks again; nobody else ever does.
        bad_action_reward: Reward of an empty, overlong or invalid action.
        roles: User seat: `"true"` (own turns are `user`) or `"flipped"` (own turns are `assistant`, after an opener).
        repetition_ratio: See `endings.is_repetition`.
        gratitude_words: See `endings.is_gratitude_loop`.
        scoring: When the driver scores: `"never"`, at the `"end"`, or at every `"turn"`.
    """

    agent_role: Role = "assistant"
    max_turns: int = 10
    token_budget: int | None = None
    max_chars: int = 16_000
    keep_think: bool = True
    bad_action_reward: float = 0.0
    roles: Literal["true", "flipped"] = "true"
    repetition_ratio: float = 0.9
    gratitude_words: int = 12
    scoring: Literal["never", "end", "turn"] = "never"

    def __post_init__(self) -> None:
        choices = {"agent_role": ("assistant", "user"), "roles": ("true", "flipped"), "scoring": ("never", "end", "turn")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        optional = ("token_budget",) if self.token_budget is not None else ()
        for name in ("max_turns", "max_chars", *optional):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("bad_action_reward", "repetition_ratio", "gratitude_words"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise SpecError(f"{name}: expected a finite number, got {value!r}")
        if not isinstance(self.keep_think, bool):
            raise SpecError(f"keep_think: expected True or False, got {self.keep_think!r}")


@dataclass(frozen=True, slots=True)
class PartnerTurn:
    """Work: the partner speaks next."""

    view: View
    seed: int
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Scoring:
    """Work: the reward function looks at the dialogue so far; `final` at the end."""

    profile: Profile
    dialogue: Dialogue
    final: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A conversation frozen between two steps: JSON values only, restorable in another process.

    Args:
        state: The episode.
        rng: State of the environment's `np_random`, or None.
    """

    state: Mapping[str, Any]
    rng: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return {"state": self.state, "rng": self.rng}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Snapshot:
        """The inverse of `to_json`."""
        if not isinstance(data, Mapping) or "state" not in data:
            raise SpecError(f"expected a snapshot (an object with 'state' and 'rng'), got {data!r:.120}")
        return cls(data["state"], data.get("rng"))


def generation_seed(episode_seed: int, branch: str, turn: int, role: Role, attempt: int = 0) -> int:
    """The seed of one generation: a keyed hash, so that any turn can be rebuilt alone. 63 bits."""
    text = f"{episode_seed}/{branch}/{turn}/{role}/{attempt}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=b"usp_env").digest(), "big") >> 1
