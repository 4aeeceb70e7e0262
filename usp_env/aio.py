"""`AsyncDialogue`: one conversation for event loops, e.g. of trainers with rollouts of their own.

    user = users.load("usp-mini", backends.load_coalesced)      # concurrent turns are merged into batches
    dialogue = AsyncDialogue(user, load_sampler(), reward="goal")
    observation, info = await dialogue.reset(spec)
    observation, reward, terminated, truncated, info = await dialogue.step("a reply")

The same episodes as `DialogueEnv`: equal seeds or specs give equal transcripts. A call that is cancelled has not happened:
the conversation stands where it stood, and may be stepped again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from gymnasium.utils import seeding

from usp_env.dialogue import Role
from usp_env.driver import Conductor
from usp_env.env import Observation, make_conductor
from usp_env.episode import Episode
from usp_env.errors import BackendError, CallOrderError, SpecError, UspError
from usp_env.records import EpisodeSpec, PartnerTurn, Reply, Scoring, check_seed
from usp_env.rewards.base import RewardLike
from usp_env.sampling.base import Sampler
from usp_env.users.base import AsyncPartner, Partner

T = TypeVar("T")


class AsyncDialogue:
    """A conversation with a simulated person, awaited.

    Args:
        partner: As in `DialogueEnv`; one that has `arespond` (every model speaker) is awaited, others answer in a thread.
        sampler: See there.
        reward: See there; it is computed in a thread.
        agent_role: See there.
        **settings: See there.

    Example:
        >>> import asyncio
        >>> from usp_env import users
        >>> from usp_env.sampling import load_sampler
        >>> async def talk():
        ...     dialogue = AsyncDialogue(users.load("scripted"), load_sampler())
        ...     observation, info = await dialogue.reset(seed=7)
        ...     observation, reward, terminated, truncated, info = await dialogue.step("Happy to help.")
        ...     return len(observation), reward
        >>> asyncio.run(talk())
        (3, 0.0)
    """

    def __init__(
        self, partner: Partner, sampler: Sampler, reward: RewardLike = None, agent_role: Role = "assistant", **settings: Any
    ) -> None:
        self.conductor: Conductor = make_conductor(partner, sampler, reward, agent_role, **settings)
        self.episode: Episode | None = None
        self._rng = seeding.np_random(None)[0]
        self._busy = False

    async def reset(
        self, spec: EpisodeSpec | None = None, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            spec: Which episode; None draws one.
            seed: Seeds the draws, as in `DialogueEnv.reset`.
            options: As in `DialogueEnv.reset`; not with `spec`.

        Raises:
            BackendError: The user's opening could not be had.
            CallOrderError: Another call is under way.
            UnknownNameError: An unknown option, population or id.
        """
        if spec is not None and options:
            raise SpecError("reset: a spec fixes the episode; leave options out")
        with self._alone():
            before, state = self._rng, self._rng.bit_generator.state
            if seed is not None:
                self._rng = seeding.np_random(check_seed(seed))[0]
            episode = self.conductor.new_episode(self._rng, {"episode": spec} if spec is not None else options)
            try:
                await self._run(episode)
            except asyncio.CancelledError:  # a reset that was cancelled has drawn nothing
                self._rng = before
                self._rng.bit_generator.state = state
                raise
            if episode.done:
                self.episode = None
                cause = episode.error or f"no usable opening came ({episode.end_reason}: {episode.rejected!r:.80})"
                raise BackendError(f"reset failed: {cause}; reset again for another user")
            self.episode = episode
            return episode.observation(), self.conductor.info(episode)

    async def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Say `action` and hear the answer.

        Raises:
            InvalidActionError: `action` is not a `str`.
            CallOrderError: Before `reset`, after the end, or while another call is under way.
        """
        with self._alone():
            if self.episode is None:
                raise CallOrderError("call reset() before step()")
            episode = self.episode.copy()  # a cancelled step leaves the conversation as it was
            episode.act(action)
            await self._run(episode)
            self.episode = episode
            if episode.done:
                self.conductor.close([episode])
            return episode.observation(), episode.reward, episode.terminated, episode.truncated, self.conductor.info(episode)

    async def _run(self, episode: Episode) -> None:
        """Do the pending work until none is left."""
        while (work := episode.pending) is not None:
            if isinstance(work, PartnerTurn):
                episode.feed(await self._reply(work))
            elif isinstance(work, Scoring):
                episode.feed((await in_thread(self.conductor.terms, [episode], work.final))[0])

    async def _reply(self, turn: PartnerTurn) -> Reply:
        partner = self.conductor.partner
        with self.conductor.timing(partner) as noted:
            try:
                if isinstance(partner, AsyncPartner):
                    noted += await partner.arespond([turn.view], [turn.seed])
                else:
                    noted += await in_thread(partner.respond, [turn.view], [turn.seed])
            except BackendError as error:
                noted.append(Reply("", error=error))
        if len(noted) != 1:
            raise UspError(f"{partner.spec}: expected one reply for one view, got {len(noted)}")
        return noted[0]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._busy:
            raise CallOrderError("a call of this dialogue is under way: await it first; each dialogue is one conversation")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """`asyncio.to_thread` for functions that may raise StopIteration, which no future can carry: its waiter would hang."""

    def call() -> T:
        try:
            return function(*arguments)
        except StopIteration as error:
            raise RuntimeError(f"{getattr(function, '__qualname__', function)} raised StopIteration") from error

    return await asyncio.to_thread(call)
