"""Rows of conditional SFT: token ids and labels of real conversations. No torch, no training.

    system (the profile)   user u_1   assistant a_1   user u_2 …      Eq. 4: loss on the u's and their end tokens alone

Which tokens are trained is decided by `usp_env.rendering` (its own spans of the user), the same code that renders a reply.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from usp_env.dialogue import Dialogue
from usp_env.profiles import Profile
from usp_env.rendering import Renderer
from usp_env.users import KINDS

IGNORED = -100  # the label of what is not trained, as torch's cross entropy knows it


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a conversation is kept.

    Args:
        tokens: Longest row with its profile; later turns are left out whole, and the row then has no end of the conversation.
        user_chars: Longest user turn; of a longer one the beginning is kept and its end token is not trained.
        reply_tokens: Lengths that replies are cut to, one drawn for each (seeded by the conversation's id), so that the model
            meets short and long ones. Empty: replies are whole.
    """

    tokens: int = 640
    user_chars: int = 1200
    reply_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Clipped:
    """What is kept of a conversation.

    Args:
        messages: True roles; a continuation may begin with the assistant.
        ended: Whether all of it is kept and it goes on nowhere else, so that the user's end of it is known.
        cut: Which user turns (0-based) are beginnings of longer ones.
    """

    messages: tuple[dict[str, str], ...]
    ended: bool
    cut: frozenset[int]


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation as the model reads it.

    Args:
        id: Of the conversation.
        input_ids: Length T.
        labels: Length T: the id on the user's content, end-of-turn and end-of-conversation tokens, -100 elsewhere.
        content: Length T; True where a label is content, no end token.
    """

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    content: tuple[bool, ...]


def system(profile: Profile | None) -> dict[str, str]:
    """The system message of USP, or without a profile of PlatoLM: what the model reads when it speaks in the environment."""
    return KINDS["plato" if profile is None else "usp"].render(Dialogue().view_for("user", profile))[0]


def clip(renderer: Renderer, profile: Profile, dialogue: Dialogue, limits: Limits, continued: bool = False) -> Clipped:
    """The turns that fit. The profile is counted whether or not it will be shown: two models see the same turns.

    Args:
        renderer: Counts the tokens.
        profile: Whose conversation it is.
        dialogue: It.
        limits: What fits.
        continued: It goes on in another segment (`training.conversations.continued`): it has no end to learn.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(profile.id.encode()).digest()[:8], "big"))
    end = len(renderer.render([], generation_role="user").token_ids) + 1  # a header and the end of the conversation
    room = limits.tokens - end - len(renderer.render([system(profile)], own_role="user").token_ids)
    kept: list[dict[str, str]] = []
    cut: set[int] = set()
    turns = 0
    for message in dialogue:
        text = message.content
        if message.role == "user":
            text, turns = text[: limits.user_chars], turns + 1
        elif limits.reply_tokens:
            text = renderer.decode(renderer.encode(text)[: int(rng.choice(limits.reply_tokens))])
        said = {"role": message.role, "content": text}
        room -= len(renderer.render([said], own_role="user").token_ids)
        if room < 0:
            return Clipped(tuple(kept), False, frozenset(cut))
        if message.role == "user" and len(message.content) > limits.user_chars:
            cut.add(turns - 1)
        kept.append(said)
    ended = bool(kept) and kept[-1]["role"] == "assistant" and not continued
    return Clipped(tuple(kept), ended, frozenset(cut))


def make_row(renderer: Renderer, profile: Profile | None, clipped: Clipped, id: str) -> Row | None:
    """The row of one conversation, without a profile that of PlatoLM; None where it has no user turn to train."""
    row = renderer.render([system(profile), *clipped.messages], own_role="user", ended=clipped.ended)
    if len(row.own_spans) <= clipped.ended:  # the end of the conversation alone
        return None
    ends = {end - 1 for _, end in row.own_spans}
    untrained = {row.own_spans[turn][1] - 1 for turn in clipped.cut}
    mask = row.own_mask
    labels = tuple(i if mask[at] and at not in untrained else IGNORED for at, i in enumerate(row.token_ids))
    return Row(id, row.token_ids, labels, tuple(mine and at not in ends for at, mine in enumerate(mask)))


def make_rows(
    renderer: Renderer,
    pairs: Iterable[tuple[Profile, Dialogue]],
    with_profile: bool = True,
    limits: Limits | None = None,
    continued: Collection[str] = (),
) -> Iterator[Row]:
    """Rows of many conversations and whose they are; those without a user turn to train are left out.

    `continued` holds the ids of conversations that go on in another segment (`training.conversations.continued`).

    Example:
        >>> list(make_rows(renderer, [(profile, dialogue)]))[0].labels  # doctest: +SKIP
        (-100, …, 4321, 2, -100, …, 0)
    """
    for profile, dialogue in pairs:
        clipped = clip(renderer, profile, dialogue, limits or Limits(), profile.id in continued)
        row = make_row(renderer, profile if with_profile else None, clipped, profile.id)
        if row is not None:
            yield row
