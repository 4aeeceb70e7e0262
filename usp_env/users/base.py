"""What a speaker is: it turns views of dialogues into replies, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from usp_env.backends.base import Backend, Generation, Request, Sampling
from usp_env.dialogue import Role, View
from usp_env.errors import BackendError, UspError
from usp_env.profiles import Profile
from usp_env.records import Reply


def profile_of(view: View, who: str) -> Profile:
    """The profile that a user speaks from; `who` names the user in the message.

    Raises:
        UspError: The view has none, or a blank one: a user that needs a profile never speaks without.
    """
    if view.profile is None or not str(view.profile).strip():
        came = "no profile" if view.profile is None else f"profile {view.profile.id!r}, which is blank"
        raise UspError(f"{who} needs a profile, got {came}; give one to Dialogue.view_for('user', profile)")
    return view.profile


@runtime_checkable
class Partner(Protocol):
    """A simulated user or an assistant.

    Attributes:
        spec: The resolved spec, recorded in transcripts; never holds a key.
        role: The side it speaks.
    """

    @property
    def spec(self) -> str: ...  # noqa: D102 - see Attributes

    @property
    def role(self) -> Role: ...  # noqa: D102

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """One reply per view, in order; all noise of a reply comes from its seed.

        Raises:
            BackendError: Nothing of the batch could be done. One failed reply is a `Reply` with `error` set.
        """
        ...


@runtime_checkable
class AsyncPartner(Partner, Protocol):
    """A partner that event loops can await."""

    async def arespond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """`respond`, awaited."""
        ...


def replies_of(partner: Partner, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
    """One reply for each view; where the partner's engine failed as a whole, its error stands in every one.

    Raises:
        UspError: The partner gave more or fewer.
    """
    try:
        replies = partner.respond(views, seeds)
    except BackendError as error:
        return [Reply("", error=error)] * len(views)
    if len(replies) != len(views):
        raise UspError(f"{partner.spec}: expected one reply for each of {len(views)} views, got {len(replies)}")
    return replies


@dataclass(frozen=True)
class ModelSpeaker:
    """A speaker that asks a backend.

    Args:
        backend: The engine.
        role: The side it speaks in the dialogue.
        spec: Recorded in transcripts.
        render: A view as `{"role", "content"}` dicts for the engine.
        header: Whose header the engine generates under (`Request.role`).
        sampling: How it samples.
        adapter: LoRA adapter, or None.
        can_end: Whether it may sample the end-of-conversation token after the opening.
        chat_template_kwargs: Passed to the chat template.
        prices: Dollars a million tokens read and written, for the ledger; None where nobody said.
    """

    backend: Backend
    role: Role
    spec: str
    render: Callable[[View], list[dict[str, str]]]
    header: Role
    sampling: Sampling
    adapter: str | None = None
    can_end: bool = False
    chat_template_kwargs: tuple[tuple[str, object], ...] = ()
    prices: tuple[float, float] | None = None

    def request(self, view: View, seed: int) -> Request:
        """What the engine is asked for this view."""
        return Request(
            messages=self.render(view),
            role=self.header,
            sampling=self.sampling,
            seed=seed,
            adapter=self.adapter,
            can_end=self.can_end and not view.opening,
            chat_template_kwargs=dict(self.chat_template_kwargs),
        )

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """One engine call for all views."""
        return _replies(self.backend.generate(self._requests(views, seeds)))

    async def arespond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """`respond` for event loops."""
        return _replies(await self.backend.agenerate(self._requests(views, seeds)))

    def _requests(self, views: Sequence[View], seeds: Sequence[int]) -> list[Request]:
        return [self.request(view, seed) for view, seed in zip(views, seeds, strict=True)]


def _replies(made: Sequence[Generation]) -> list[Reply]:
    return [Reply(g.text, g.finish_reason == "end", g, g.error) for g in made]
