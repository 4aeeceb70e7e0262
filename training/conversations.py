"""Real conversations beside the profiles of a bank, read once a process. Reserved conversations never come out."""

from __future__ import annotations

from functools import cache

from usp_env.data import conversations
from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.profiles import PACKAGED, Profile, ProfileBank


@cache
def of_split(bank: str, split: str) -> tuple[tuple[Profile, Dialogue], ...]:
    """Each profile of a split and its conversation, by id.

    Args:
        bank: `sharegpt` (its conversations come from the package of that name), or a JSONL bank whose lines hold theirs.
        split: `train`, `val` or `test`.
    """
    return _joined(ProfileBank.load(bank, split), bank)


def silver_of(silver: str, bank: str) -> tuple[tuple[Profile, Dialogue], ...]:
    """The `train` profiles of a silver bank and their conversations, from where the gold bank's come.

    Args:
        silver: `sharegpt-silver`, or a JSONL bank that a profile generator wrote (`usp-env profiles extract --generator`).
        bank: The gold bank, as in `of_split`. Of a JSONL bank the conversations are the silver lines' own.

    Raises:
        SpecError: Somebody is in both: a person of the validation or the test would be trained on.
    """
    people = ProfileBank.load(silver, "train")
    # By person: later segments of a conversation, and its copies, have ids of their own.
    gold = {conversations.group_id(profile.id) for profile in ProfileBank.load(bank)}
    if both := [profile.id for profile in people if conversations.group_id(profile.id) in gold]:
        raise SpecError(f"--silver {silver}: expected people who are not in {bank!r}, {len(both)} are: {min(both)!r} …")
    return _joined(people, bank if bank in PACKAGED else silver)


def _joined(people: ProfileBank, source: str) -> tuple[tuple[Profile, Dialogue], ...]:
    found = conversations.join(people, conversations.load(source, ids={profile.id for profile in people}))
    return tuple(sorted(found, key=lambda pair: pair[0].id))


@cache
def continued(bank: str) -> frozenset[str]:
    """Ids of the bank's conversations that go on in a later segment, so that nobody ended them.

    Args:
        bank: As in `of_split`. Of a JSONL bank only the segments that it holds are known.
    """
    return conversations.continued(bank)
