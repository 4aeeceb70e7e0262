"""Policies that need no training: a speaker named by a spec, as an agent of the environment.

policy = SpeakerPolicy.load("smollm2-135m")
observations, infos = envs.reset(seed=0)
observations, rewards, terminations, truncations, infos = envs.step(policy(observations, seeds))
"""

from __future__ import annotations

from collections.abc import Sequence

from usp_env import assistants
from usp_env.dialogue import Act, Dialogue
from usp_env.env import Observation
from usp_env.errors import BackendError
from usp_env.users.base import Partner


class SpeakerPolicy:
    """An assistant as a policy over observations of the assistant seat.

    Args:
        speaker: What speaks, e.g. `usp_env.assistants.load("echo")`.

    Example:
        >>> policy = SpeakerPolicy.load("echo")
        >>> policy([({"role": "user", "content": "hi"},)], [0])
        ['hi']
    """

    def __init__(self, speaker: Partner) -> None:
        self.speaker = speaker

    @classmethod
    def load(cls, spec: str) -> SpeakerPolicy:
        """The policy of an assistant spec."""
        return cls(assistants.load(spec))

    def __call__(self, observations: Sequence[Observation], seeds: Sequence[int]) -> list[str]:
        """One action per observation; an empty one (a lane that started failed) gets an empty action.

        Raises:
            BackendError: A call failed after its retries.
        """
        live = [index for index, observation in enumerate(observations) if observation]
        views = [Dialogue.of(observations[index]).view_for("assistant") for index in live]
        actions: list[str] = [Act("")] * len(observations)
        for index, reply in zip(live, self.speaker.respond(views, [seeds[index] for index in live]), strict=True):
            if reply.error is not None:
                raise BackendError(f"the policy's engine failed: {reply.error}") from reply.error
            made = reply.generation
            facts = (made.token_ids, made.logprobs, made.finish_reason, made.usage) if made is not None else ()
            actions[index] = Act(reply.text, *facts)
        return actions
