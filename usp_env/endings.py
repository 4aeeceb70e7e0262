"""When a conversation has run dry, and when a user forgets who it is. Pure functions over texts.

The paper's early-stop rate (ESR, §5.3) flags repetition and repeated gratitude over three turns without giving
thresholds; ours are arguments with the defaults below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations

from usp_env.dialogue import Role

WINDOW = 3
_THANKS = re.compile(r"\b(thanks?|thank you|thx|tysm|ty|appreciated?|grateful|gratitude|cheers|much obliged)\b", re.IGNORECASE)
_LABELS = {
    "assistant": re.compile(r"^\s*[\[(*]{0,2}(ai )?(assistant|chatgpt|chatbot)[\])*]{0,2}\s*:", re.IGNORECASE | re.MULTILINE),
    "user": re.compile(r"^\s*[\[(*]{0,2}(the )?(user|human)[\])*]{0,2}\s*:", re.IGNORECASE | re.MULTILINE),
}


def similar(a: str, b: str, ratio: float) -> bool:
    """Whether difflib's similarity of two texts, case ignored, is at least `ratio` in [0, 1]."""
    a, b = a.casefold(), b.casefold()
    if a == b:
        return ratio <= 1.0
    # The cheap upper bounds come first: most pairs end there, and this runs at every turn of every episode.
    if 2 * min(len(a), len(b)) < ratio * (len(a) + len(b)):
        return False
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    return matcher.quick_ratio() >= ratio and matcher.ratio() >= ratio


def is_repetition(utterances: Sequence[str], ratio: float = 0.9) -> bool:
    """Whether the last three utterances of a user are pairwise near-equal.

    Example:
        >>> is_repetition(["Tell me more.", "tell me more", "Tell me more!"])
        True
    """
    last = utterances[-WINDOW:]
    # Newest pairs first: they are the ones that differ in a healthy conversation.
    return len(last) == WINDOW and all(similar(a, b, ratio) for a, b in combinations(reversed(last), 2))


def is_gratitude_loop(utterances: Sequence[str], max_words: int = 12) -> bool:
    """Whether each of a user's last three utterances is at most `max_words` words of thanks.

    Example:
        >>> is_gratitude_loop(["Thanks!", "Thank you so much", "ok, thanks again"])
        True
    """
    last = utterances[-WINDOW:]
    return len(last) == WINDOW and all(_THANKS.search(text) and len(text.split()) <= max_words for text in reversed(last))


def speaks_as(text: str, role: Role) -> bool:
    """Whether a text holds a line that begins with the other speaker's label (`Assistant: …`).

    Example:
        >>> speaks_as("Assistant: Sure, here it is.", "assistant"), speaks_as("my assistant: Bob", "assistant")
        (True, False)
    """
    return bool(_LABELS[role].search(text))
