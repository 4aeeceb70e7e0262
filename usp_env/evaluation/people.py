"""Whom a user is compared with: the people of a split, what they really said, and who of `train` wanted the most alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from usp_env.data import conversations
from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.profiles import Profile, ProfileBank
from usp_env.users.replay import Nearest


@dataclass(frozen=True, slots=True)
class Person:
    """One person and their real conversation.

    Args:
        profile: Read from the conversation.
        dialogue: It; a continuation may begin with the assistant.
        ended: Whether the person ended it where it stops. False where it goes on in another segment or stops at their own turn.
    """

    profile: Profile
    dialogue: Dialogue
    ended: bool

    @property
    def id(self) -> str:
        """The profile's."""
        return self.profile.id

    @property
    def turns(self) -> list[str]:
        """What the person said, in order."""
        return self.dialogue.utterances("user")


def load(bank: str, split: str | None) -> list[Person]:
    """Everybody of a split who said something, in an order whose first `n` are a fair sample for every `n`.

    Args:
        bank: `sharegpt` (its conversations are the fetched asset's), or a JSONL bank whose lines hold theirs.
        split: None for the whole bank.

    Raises:
        MissingAssetError: A profile's conversation is not there.
        SpecError: Nobody said anything.
    """
    profiles = ProfileBank.load(bank, split)
    found = conversations.join(profiles, conversations.load(bank, ids={profile.id for profile in profiles}))
    cut = conversations.continued(bank)
    people = [person(profile, dialogue, profile.id in cut) for profile, dialogue in found]
    people = [who for who in people if any(turn.strip() for turn in who.turns)]
    if not people:
        raise SpecError(f"bank {bank!r}, split {split!r}: expected conversations with user turns, found none")
    return sorted(people, key=lambda who: hashlib.sha256(who.id.encode()).digest())


def person(profile: Profile, dialogue: Dialogue, continued: bool = False) -> Person:
    """A person; `continued`: the conversation goes on in another segment.

    Example:
        >>> talk = Dialogue.of([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}])
        >>> person(Profile("a", "You cook.", "Terse."), talk).ended, person(Profile("a", "You cook.", "Terse."), talk, True).ended
        (True, False)
    """
    return Person(profile, dialogue, len(dialogue) > 0 and dialogue[-1].role == "assistant" and not continued)


def neighbours(people: Sequence[Person], bank: str) -> dict[str, Dialogue]:
    """The real conversation of the one of `train` whose objective facts share most rare words, for each person.

    Where the people are themselves of that pool, it is halved, and each half looks in the other: nobody finds themself.
    """
    pool = ProfileBank.load(bank)
    trained = ProfileBank([profile for profile in pool if profile.split == "train"] or list(pool), pool.name)
    found = nearest(people, trained)
    wanted = ProfileBank([trained.get(other) for other in dict.fromkeys(found.values())], pool.name)
    said = {p.id: talk for p, talk in conversations.join(wanted, conversations.load(bank, ids={p.id for p in wanted}))}
    return {id: said[other] for id, other in found.items()}


def nearest(people: Sequence[Person], pool: ProfileBank) -> dict[str, str]:
    """Id of each person to id of their neighbour in the pool; people who have none are left out."""
    if {profile.id for profile in pool}.isdisjoint(who.id for who in people):
        look = Nearest({profile.id: profile.objective for profile in pool})
        return {who.id: look(who.profile.objective) for who in people}
    halves = [{profile.id: profile.objective for profile in pool[half::2]} for half in (0, 1)]
    other = [Nearest(half) if half else None for half in halves]
    found = {}
    for who in people:
        if (find := other[who.id in halves[0]]) is not None:
            found[who.id] = find(who.profile.objective)
    return found


def digest(people: Sequence[Person]) -> str:
    """SHA-256 over ids, profiles and what was really said, in order."""
    lines = (f"{p.id}\0{p.profile}\0{p.ended}\0" + "\0".join(f"{m.role}:{m.content}" for m in p.dialogue) for p in people)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
