"""A dialogue as the token row that its speaker saw and made: sampled ids as they were sampled, nothing tokenised twice.

    row = row_of(renderer, prefix, episode.messages, "user")
    row.token_ids[t], row.utterance_ids[t], row.behaviour[t]

The same function makes the prompt of the next utterance and the row that is trained, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from usp_env.backends.base import Generation
from usp_env.dialogue import Message, Role
from usp_env.rendering import Renderer


@dataclass(frozen=True, slots=True)
class Row:
    """One dialogue, T tokens.

    Args:
        token_ids: (T,).
        utterance_ids: (T,), 0 … K−1 on own tokens, −1 elsewhere.
        behaviour: (T,) log-probability of each own token when it was sampled; 0 elsewhere.
        banned: (T,) whether the end of the conversation could not be sampled there: own tokens of an opening, and all of an
            assistant, who has no right to it.
    """

    token_ids: tuple[int, ...]
    utterance_ids: tuple[int, ...]
    behaviour: tuple[float, ...]
    banned: tuple[bool, ...]

    @property
    def utterances(self) -> int:
        """K."""
        return max(self.utterance_ids, default=-1) + 1

    @property
    def own(self) -> int:
        """Number of own tokens."""
        return sum(index >= 0 for index in self.utterance_ids)

    def only_last(self) -> Row:
        """The row with its last utterance alone as own; the others are context."""
        last = self.utterances - 1
        return Row(
            self.token_ids,
            tuple(0 if index == last >= 0 else -1 for index in self.utterance_ids),
            tuple(p if index == last else 0.0 for p, index in zip(self.behaviour, self.utterance_ids, strict=True)),
            tuple(b and index == last for b, index in zip(self.banned, self.utterance_ids, strict=True)),
        )


def row_of(
    renderer: Renderer,
    prefix: Sequence[dict[str, str]],
    messages: Sequence[Message],
    role: Role,
    last: Generation | None = None,
    opens: bool = False,
) -> Row:
    """The row of a dialogue.

    Args:
        renderer: Of the speaker's model.
        prefix: What stands before the dialogue, e.g. the system message with the profile.
        messages: The dialogue. Messages of `role` that hold `token_ids` are own; one without (a given opening) is context.
        role: The speaker.
        last: What the speaker sampled last and what did not become a message: an end without words, or nothing sayable.
        opens: Whether a header of `role` is opened at the end: the row is then a prompt.

    An utterance that was cut off at its limit has no end of its own; the end of turn that follows is context, not trained. A
    final header token, with which a reply opened somebody else's turn, is left out.
    """
    made = _Growing(renderer, role, list(prefix))
    for k, message in enumerate(messages):
        if message.role != role:
            made.waiting.append(message.chat())
            continue
        made.open()
        if message.token_ids is None:
            made.context((*renderer.encode(message.content), renderer.end_of_turn_id))
        else:
            made.own(message.token_ids, message.logprobs, opening=k == 0)
    if opens or last is not None:
        made.open()
    if last is not None and last.token_ids:
        made.own(last.token_ids, last.logprobs, opening=not messages)
    return Row(tuple(made.ids), tuple(made.utterance_ids), tuple(made.behaviour), tuple(made.banned))


class _Growing:
    """A row that is put together from the left."""

    def __init__(self, renderer: Renderer, role: Role, waiting: list[dict[str, str]]) -> None:
        self.renderer, self.role, self.waiting = renderer, role, waiting  # waiting: said since the last own utterance
        self.ids: list[int] = []
        self.utterance_ids: list[int] = []
        self.behaviour: list[float] = []
        self.banned: list[bool] = []
        self.utterances = 0

    def open(self) -> None:
        """Append what was said since, and the speaker's header."""
        if self.ids:
            self.context(self.renderer.delta(self.ids, self.waiting, self.role))
        else:
            self.context(self.renderer.render(self.waiting, generation_role=self.role).token_ids)
        self.waiting = []

    def context(self, ids: Sequence[int]) -> None:
        """Append ids that are not trained."""
        self._append(ids, -1, [0.0] * len(ids), False)

    def own(self, ids: Sequence[int], behaviour: Sequence[float] | None, opening: bool) -> None:
        """Append an utterance as it was sampled."""
        said = ids[:-1] if ids and ids[-1] == self.renderer.header_start_id else ids
        if said:
            banned = opening or self.role != "user"
            self._append(said, self.utterances, (behaviour or [0.0] * len(ids))[: len(said)], banned)
            self.utterances += 1

    def _append(self, ids: Sequence[int], utterance: int, behaviour: Sequence[float], banned: bool) -> None:
        self.ids += ids
        self.utterance_ids += [utterance] * len(ids)
        self.behaviour += behaviour
        self.banned += [banned] * len(ids)
