"""Real conversations beside the profiles of a bank, read once a process. Reserved conversations never come out."""

from __future__ import annotations

from functools import cache

from usp_env.data import conversations
from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.profiles import PACKAGED, Profile, ProfileBank, reserved_ids

LONG = 40  # characters of a user turn that two people do not write alike by chance


@cache
def of_split(bank: str, split: str) -> tuple[tuple[Profile, Dialogue], ...]:
    """Each profile of a split and its conversation, by id; in `train` nobody who shares one of `held_out_turns`.

    Args:
        bank: `sharegpt` (its conversations come from the package of that name), or a JSONL bank whose lines hold theirs.
        split: `train`, `val` or `test`.
    """
    found = _joined(ProfileBank.load(bank, split), bank)
    return _without(found, held_out_turns(bank)) if split == "train" else found


def held_out_turns(bank: str) -> frozenset[str]:
    """User turns of at least `LONG` characters of `val`, `test` and, for a packaged bank, reserved conversations.

    Some people pasted the same prompt. Who shares one of these is not trained on, or what is measured was learnt by heart.

    Args:
        bank: As in `of_split`.
    """
    people = [profile for profile in ProfileBank.load(bank) if profile.split in ("val", "test")]
    dialogues = [dialogue for _, dialogue in _joined(ProfileBank(people, bank), bank)]
    if bank in PACKAGED:
        dialogues += [found.dialogue for found in conversations.load(bank, reserved=True, ids=reserved_ids())]
    turns = (turn.strip() for dialogue in dialogues for turn in dialogue.utterances("user"))
    return frozenset(turn for turn in turns if len(turn) >= LONG)


def shares(dialogue: Dialogue, turns: frozenset[str]) -> bool:
    """Whether a user turn of a conversation is one of `turns`."""
    return any(turn.strip() in turns for turn in dialogue.utterances("user"))


def _without(pairs: tuple[tuple[Profile, Dialogue], ...], turns: frozenset[str]) -> tuple[tuple[Profile, Dialogue], ...]:
    return tuple(pair for pair in pairs if not shares(pair[1], turns))


def silver_of(silver: str, bank: str) -> tuple[tuple[Profile, Dialogue], ...]:
    """The `train` profiles of a silver bank and their conversations, from where the gold bank's come; `held_out_turns` as there.

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
    return _without(_joined(people, bank if bank in PACKAGED else silver), held_out_turns(bank))


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
