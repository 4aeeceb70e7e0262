"""The real user's own turns, in order: no model, no randomness.

`replay:<bank>` needs a bank whose lines hold a `conversation`. The turns are those of the profile's own conversation; for
a virtual profile those of its OF donor, who brought the requests; for anyone else those of the profile whose objective facts
share most rare words (TF-IDF cosine). It says one turn after another whatever the assistant says, and ends when they
run out.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

from usp_env.dialogue import Role, View
from usp_env.errors import SpecError
from usp_env.profiles import VIRTUAL_PREFIX, Profile, ProfileBank
from usp_env.records import Reply
from usp_env.users.base import profile_of

_WORD = re.compile(r"\w+")


class Nearest:
    """Finds the most similar of some texts: cosine of tf·idf vectors, idf = ln(n / df) + 1; ties go to the first.

    Args:
        texts: Key to text, at least one.

    Example:
        >>> Nearest({"a": "You bake rye bread.", "b": "You debug Python."})("You ask how to bake bread.")
        'a'
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        counts = {key: Counter(_WORD.findall(text.casefold())) for key, text in texts.items()}
        df = Counter(word for count in counts.values() for word in count)
        self._idf = {word: math.log(len(counts) / n) + 1 for word, n in df.items()}
        self._first = next(iter(counts))
        self._postings: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for key, count in counts.items():
            weights = {word: n * self._idf[word] for word, n in count.items()}
            norm = math.sqrt(sum(w * w for w in weights.values()))
            for word, weight in weights.items():
                self._postings[word].append((key, weight / norm))

    def __call__(self, text: str) -> str:
        """The key of the nearest text; the first where no word is shared."""
        scores: dict[str, float] = defaultdict(float)
        for word, n in Counter(_WORD.findall(text.casefold())).items():
            for key, weight in self._postings.get(word, ()):
                scores[key] += n * self._idf[word] * weight
        return max(scores, key=scores.__getitem__, default=self._first)


class ReplaySpeaker:
    """Says the turns of real users; see the module's docstring.

    Args:
        bank: Who they were; profiles without a conversation are not replayed.
        spec: Recorded in transcripts.

    Raises:
        SpecError: No profile of the bank has a conversation with a user turn.
    """

    role: Role = "user"

    def __init__(self, bank: ProfileBank, spec: str = "replay") -> None:
        self.spec = spec
        self._turns = {profile.id: turns for profile in bank if (turns := user_turns(profile))}
        if not self._turns:
            raise SpecError(
                f"user {spec!r}: expected profiles with a 'conversation' that holds user turns, and none of the {len(bank)} "
                f"profiles of bank {bank.name!r} has one (the packaged bank ships without); name a JSONL file that has them"
            )
        nearest = Nearest({profile.id: profile.objective for profile in bank if profile.id in self._turns})
        self._nearest = lru_cache(maxsize=4096)(nearest)  # asked again at every turn

    @classmethod
    def load(cls, bank: str) -> ReplaySpeaker:
        """The speaker of a bank's name or file."""
        if not bank:
            raise SpecError("user 'replay': expected replay:BANK, a JSONL file whose lines hold a 'conversation'")
        return cls(ProfileBank.load(bank), f"replay:{bank}")

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """Each donor's next turn."""
        return [self._reply(view) for view in views]

    def donor(self, profile: Profile) -> str:
        """The id of the profile whose turns stand for this one's."""
        known = (key for key in _candidates(profile.id) if key in self._turns)
        return next(known, None) or self._nearest(profile.objective)

    def _reply(self, view: View) -> Reply:
        turns = self._turns[self.donor(profile_of(view, "a replayed user"))]
        said = sum(message.role == "user" for message in view.messages)
        return Reply(turns[said]) if said < len(turns) else Reply("", ended=True)


def user_turns(profile: Profile) -> list[str]:
    """What the user said in the profile's own conversation; blank turns are left out."""
    conversation = (profile.attributes or {}).get("conversation") or ()
    said = [m.get("content") for m in conversation if isinstance(m, Mapping) and m.get("role") == "user"]
    return [text for text in said if isinstance(text, str) and text.strip()]


def _candidates(profile_id: str) -> list[str]:
    """The id itself, then every id that may be the OF donor's of a virtual profile (ids may hold plus signs)."""
    if not profile_id.startswith(VIRTUAL_PREFIX):
        return [profile_id]
    parts = profile_id.removeprefix(VIRTUAL_PREFIX).split("+")
    return [profile_id, *("+".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1))]
