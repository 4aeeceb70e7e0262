"""Wrappers of `DialogueEnv`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from usp_env.env import DialogueEnv, Observation
from usp_env.errors import SpecError
from usp_env.spaces import Utterance
from usp_env.transcripts import RunDirectory


class LastUtterance(gym.ObservationWrapper[str, str, Observation], RecordConstructorArgs):
    """Only the newest text of the conversation.

    In the user seat the first observation is the system message with the profile.

    Example:
        >>> import gymnasium as gym, usp_env
        >>> env = LastUtterance(gym.make("usp_env/Assistant-v0", user="scripted", reward=None))
        >>> isinstance(env.reset(seed=0)[0], str)
        True
    """

    def __init__(self, env: gym.Env[Observation, str]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = Utterance(max_chars=10**9)

    def observation(self, observation: Observation) -> str:
        """The last message's text."""
        return observation[-1]["content"]


class RecordTranscripts(gym.Wrapper[Observation, str, Observation, str], RecordConstructorArgs):
    """Writes finished episodes to a run directory, from any loop; `DialogueVectorEnv` takes `record=` itself.

    Args:
        env: A `DialogueEnv`, wrapped or not.
        directory: Where to; see `usp_env.transcripts.RunDirectory`.
        config: Recorded in `run.json`.
        resume: Add to the run that is there.
        overwrite: Begin anew over it.
    """

    def __init__(
        self,
        env: gym.Env[Observation, str],
        directory: str | Path,
        config: dict[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        RecordConstructorArgs.__init__(self, directory=str(directory), config=config, resume=resume, overwrite=overwrite)
        gym.Wrapper.__init__(self, env)
        inner = env.unwrapped
        if not isinstance(inner, DialogueEnv):
            raise SpecError(f"expected a (wrapped) DialogueEnv, got {type(inner).__name__}")
        self.run = inner.conductor.record = RunDirectory(directory, config, resume, overwrite)
