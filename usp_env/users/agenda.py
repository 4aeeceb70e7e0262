"""A user with an agenda: a stack of goals and rules, no model, no randomness.

The stack is the profile's `task_details`, the first on top. The user says the top; a reply that refuses or only asks back
makes it say that again, any other reply (or the second) pops it. With an empty stack the user thanks and ends. The state
is read off the conversation; utterances that are not the agenda's own (a given opening) change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from usp_env.dialogue import Role, View
from usp_env.errors import SpecError, UspError
from usp_env.records import Reply
from usp_env.users.base import profile_of

THANKS = "Thanks, that is all I needed."
AGAIN = "Let me say it again: {}"
_REFUSES = re.compile(
    r"\bI(?:'m| am)? (?:\w+ )?(?:can't|cannot|can not|couldn't|unable|not able|won't|will not|sorry|apologi[sz]e)\b"
    r"|\bas an ai\b|^\W*sorry\b",
    re.IGNORECASE,
)
_HEAD, _ANSWER = 200, 40  # characters in which a refusal is looked for; words from which a reply has answered before it asks

_ASK, _IT = r"(?:please )?(?:ask|asked|request|requested)(?: again)?", r"(?:it|the assistant|the model|chatgpt)"
_FRAMES = tuple(
    (re.compile(pattern, re.IGNORECASE), frame)
    for pattern, frame in (
        (rf"(?:{_ASK}|tell|told)(?: {_IT})? to (.+)", "Please {}."),
        (rf"{_ASK} that (.+)", "I would like that {}."),
        (rf"{_ASK}(?: {_IT})? for (.+)", "Can you give me {}?"),
        (r"request(?:ed)? (.+)", "Can you give me {}?"),
        (rf"{_ASK}(?: {_IT})? (.+)", "Can you tell me {}?"),
        (r"((?:what|how|why|when|where|who|which|whether|if)\b.+)", "Can you tell me {}?"),
        (r"(?:say|report|point out|add|explain|object|clarify|note|state|announce|insist|repeat|confirm) that (.+)", "{}."),
    )
)


@dataclass(frozen=True)
class AgendaSpeaker:
    """Speaks the user from its profile's requests; see the module's docstring.

    Example:
        >>> from usp_env.dialogue import Dialogue
        >>> from usp_env.profiles import Profile
        >>> facts = {"objective_facts": {"scenarios": [{"task_details": ["Ask for a soup recipe"]}]}}
        >>> cook = Profile("a", "You cook.", "You are terse.", facts)
        >>> AgendaSpeaker().respond([Dialogue().view_for("user", cook)], [0])[0].text
        'Can you give me a soup recipe?'
    """

    role: Role = "user"
    spec: str = "agenda"

    @classmethod
    def load(cls, rest: str) -> AgendaSpeaker:
        """The speaker; nothing may follow its name in a spec."""
        if rest:
            raise SpecError(f"user 'agenda:{rest}': expected 'agenda' alone: the requests are the profile's")
        return cls()

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """Each agenda's next utterance."""
        return [self._reply(view) for view in views]

    def _reply(self, view: View) -> Reply:
        profile = profile_of(view, "an agenda user")
        requests = [utterance(detail) for detail in profile.task_details if detail.strip()]
        if not requests:
            raise UspError(f"an agenda user needs a profile with task_details (attributes 'objective_facts'), got {profile.id!r}")
        goal, tries = _state(view, requests)
        if goal == len(requests):
            return Reply(THANKS, ended=True)
        return Reply(AGAIN.format(requests[goal]) if tries else requests[goal])


def utterance(detail: str) -> str:
    """A request in the user's mouth, by rules: `task_details` are notes such as "Ask for a recipe".

    Example:
        >>> utterance("Ask what DIF means"), utterance("Write a haiku"), utterance("Ask it to continue")
        ('Can you tell me what DIF means?', 'Write a haiku.', 'Please continue.')
    """
    bare = detail.strip().rstrip(".!")
    found = ((pattern.fullmatch(bare), frame) for pattern, frame in _FRAMES)
    match, frame = next(((m, frame) for m, frame in found if m), (None, "{}." if bare else "."))
    inner = match[1] if match else bare
    if match and match.start(1) == 0:  # its first word is no longer the first
        inner = inner[0].lower() + inner[1:]
    said = bare if bare.endswith("?") else frame.format(inner)
    return said[0].upper() + said[1:]


def unmet(reply: str) -> bool:
    """Whether a reply refuses, only asks back, or is blank.

    Example:
        >>> [unmet(text) for text in ("I'm sorry, I can't do that.", "For how many people?", "Boil the leeks.")]
        [True, True, False]
    """
    text = reply.strip()
    asks = text.endswith("?") and len(text.split()) < _ANSWER
    return not text or asks or bool(_REFUSES.search(text.replace("’", "'")[:_HEAD]))


def _state(view: View, requests: Sequence[str]) -> tuple[int, int]:
    """The goal on top and how often it was said, from the conversation so far."""
    goal = tries = 0
    for message in view.messages:
        if message.role == "user" and goal < len(requests):
            tries += message.content == (AGAIN.format(requests[goal]) if tries else requests[goal])
        elif tries >= 2 or (tries == 1 and not unmet(message.content)):
            goal, tries = goal + 1, 0
    return goal, tries
