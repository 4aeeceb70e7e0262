"""Real conversations beside the profiles of a bank, read once a process. Reserved conversations never come out."""

from __future__ import annotations

from functools import cache

from usp_env.data import conversations
from usp_env.dialogue import Dialogue
from usp_env.profiles import Profile, ProfileBank


@cache
def of_split(bank: str, split: str) -> tuple[tuple[Profile, Dialogue], ...]:
    """Each profile of a split and its conversation, by id.

    Args:
        bank: `sharegpt` (its conversations come from the package of that name), or a JSONL bank whose lines hold theirs.
        split: `train`, `val` or `test`.
    """
    people = ProfileBank.load(bank, split)
    found = conversations.join(people, conversations.load(bank, ids={profile.id for profile in people}))
    return tuple(sorted(found, key=lambda pair: pair[0].id))


@cache
def continued(bank: str) -> frozenset[str]:
    """Ids of the bank's conversations that go on in a later segment, so that nobody ended them.

    Args:
        bank: As in `of_split`. Of a JSONL bank only the segments that it holds are known.
    """
    return conversations.continued(bank)
