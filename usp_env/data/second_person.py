"""First-person persona sentences, as PersonaChat has them, in the second person of a profile."""

from __future__ import annotations

import re

_PAIRS = {
    "i am": "you are",
    "am i": "are you",
    "i was": "you were",
    "was i": "were you",
    "i'm": "you're",
    "i": "you",
    "me": "you",
    "my": "your",
    "mine": "yours",
    "myself": "yourself",
}
_FIRST = re.compile(r"\b(?:" + "|".join(pair.replace(" ", r"\s+") for pair in _PAIRS) + r")\b", re.IGNORECASE)


def second_person(sentence: str) -> str:
    """The sentence said to the person, with a capital and a full stop.

    Example:
        >>> second_person("i love my dog and i'm a cook ."), second_person("My mom is a nurse. I was born in Ohio")
        ("You love your dog and you're a cook.", 'Your mom is a nurse. You were born in Ohio.')
    """
    text = _FIRST.sub(lambda match: _PAIRS[re.sub(r"\s+", " ", match[0].lower())], sentence.strip())
    text = re.sub(r"\s+([.,!?])", r"\1", text)
    text = re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda match: match[0].upper(), text)
    return text if text.endswith((".", "!", "?")) else f"{text}."
