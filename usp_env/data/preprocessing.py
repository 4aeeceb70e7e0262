"""From raw conversations to training data: small steps over a stream, with a report of what each step did.

    report = Report()
    steps = [*clean(), alternate(), language(), toxicity(), dedupe(), segment(2048, count), length(min_turns=1)]
    for conversation in pipeline(load("wildchat"), steps, report): ...

The order and the rules are PlatoLM's and USP's (Kong et al. 2024, `for_socratic`; Wang et al. 2025, A.1), with three
departures: the language is detected instead of dropping every turn that holds a character beyond ASCII, toxicity has a
documented rule, and blank or doubled turns are mended instead of kept. Everything streams: memory does not grow with the
number of conversations, but for `dedupe`'s 16 bytes each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import resources
from typing import Any

from usp_env.data.cleaning import RULES, Rule, mend_dialogue
from usp_env.data.conversations import Conversation
from usp_env.data.pipeline import Report, Step, pipeline
from usp_env.dialogue import Dialogue, Message
from usp_env.errors import SpecError, require

__all__ = [
    "Report",
    "Step",
    "alternate",
    "clean",
    "dedupe",
    "detect_language",
    "digest",
    "language",
    "length",
    "merge",
    "pipeline",
    "segment",
    "segments",
    "toxicity",
]
Count = Callable[[str], int]
Detector = Callable[[str], str | None]
_NAMES = {"english": "en", "chinese": "zh", "german": "de", "french": "fr", "spanish": "es", "italian": "it"}
_NAMES |= {"portuguese": "pt", "russian": "ru", "japanese": "ja", "korean": "ko", "arabic": "ar", "dutch": "nl"}
_BLANK = re.compile("[\\s\u200b\ufeff]*")


def clean(rules: Iterable[Rule] = RULES) -> list[Step]:
    """One step for each kind of ShareGPT export artefact (`usp_env.data.cleaning`); load with `clean=False` to count them."""
    return [Step(f"clean: {rule.name}", partial(_mend, rule)) for rule in rules]


def _mend(rule: Rule, conversation: Conversation) -> list[Conversation]:
    return [_with(conversation, mend_dialogue(rule, conversation.dialogue))]


def _with(conversation: Conversation, dialogue: Dialogue) -> Conversation:
    return conversation if dialogue is conversation.dialogue else replace(conversation, dialogue=dialogue)


def alternate() -> Step:
    """Leave out blank turns, then merge consecutive turns of one side with a blank line between them."""

    def apply(conversation: Conversation) -> list[Conversation]:
        said = [m for m in conversation.dialogue if not _BLANK.fullmatch(m.content)]
        merged = merge(said)
        if len(merged) == len(conversation.dialogue):
            return [conversation] if merged else []
        return [_with(conversation, Dialogue(tuple(merged)))] if merged else []

    return Step("alternate", apply)


def merge(messages: Iterable[Message]) -> list[Message]:
    r"""The messages with consecutive ones of the same role made one.

    Example:
        >>> [m.content for m in merge([Message("user", "a"), Message("user", "b"), Message("assistant", "c")])]
        ['a\n\nb', 'c']
    """
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            merged[-1] = Message(message.role, f"{merged[-1].content}\n\n{message.content}")
        else:
            merged.append(message)
    return merged


def language(keep: Collection[str] = ("en",), detect: Detector | None = None) -> Step:
    """Drop conversations in other languages: by the source's own label, else by what the user writes.

    Args:
        keep: ISO 639-1 codes.
        detect: Text to code, or None where it cannot tell; such a conversation stays. Default: `detect_language`.
    """

    def apply(conversation: Conversation) -> list[Conversation]:
        code = conversation.language
        if code is None:
            code = (detect or detect_language)(_evidence(conversation.dialogue))
        else:
            code = _NAMES.get(code.lower(), code.lower())
        return [conversation] if code is None or code in keep else []

    return Step("language", apply)


def _evidence(dialogue: Dialogue) -> str:
    """What the user writes, at most 500 characters a turn and 3,000 in all; short users borrow from the replies."""
    text = "\n".join(said[:500] for said in dialogue.utterances("user"))[:3000]
    return text if len(text) >= 200 else "\n".join([text, *(said[:200] for said in dialogue.utterances("assistant")[:5])])


def detect_language(text: str) -> str | None:
    """The text's language (ISO 639-1, py3langid), or None where it is not sure; deterministic.

    Raises:
        MissingExtraError: py3langid is not installed.
    """
    code, _ = _identifier().classify(text)
    return None if code in ("und", "zxx") else str(code)


@cache
def _identifier() -> Any:
    langid = require("py3langid.langid", "data")
    # An own instance: the module's convenience functions share a global one.
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True, min_confidence=0.8)


def toxicity(terms: Collection[str] | None = None) -> Step:
    """Drop toxic conversations: by the source's moderation flags where it has them, else by terms in the user's turns.

    Args:
        terms: Whole words or phrases, case ignored; default: the sexual, hateful and self-harm terms of
            `toxic_terms.json`. A term list is crude: it drops a nurse's question and lets insinuation pass.
    """
    words = _terms() if terms is None else tuple(terms)
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + r")\b", re.IGNORECASE)

    def apply(conversation: Conversation) -> list[Conversation]:
        toxic = conversation.toxic
        if toxic is None:
            toxic = bool(words) and any(pattern.search(said) for said in conversation.dialogue.utterances("user"))
        return [] if toxic else [conversation]

    return Step("toxicity", apply)


@cache
def _terms() -> tuple[str, ...]:
    kinds: dict[str, list[str]] = json.loads((resources.files("usp_env.data") / "toxic_terms.json").read_text("utf-8"))
    return tuple(term for terms in kinds.values() for term in terms)


def dedupe() -> Step:
    """Drop conversations whose turns are exactly those of an earlier one; remembers 16 bytes of each."""
    seen: set[bytes] = set()

    def apply(conversation: Conversation) -> list[Conversation]:
        key = digest(conversation.dialogue)
        if key in seen:
            return []
        seen.add(key)
        return [conversation]

    return Step("dedupe", apply)


def digest(dialogue: Dialogue) -> bytes:
    """16 bytes (BLAKE2b) that stand for a dialogue's roles and texts."""
    said = hashlib.blake2b(digest_size=16)
    for message in dialogue:
        text = message.content.encode("utf-8", "surrogatepass")
        said.update(f"{message.role} {len(text)} ".encode())
        said.update(text)
    return said.digest()


def segment(max_tokens: int, count: Count) -> Step:
    """Cut long conversations as PlatoLM does (`segments`).

    The first segment keeps the conversation's id, the k-th continuation is `"<id>#<k>"`. Segments without a user turn hold
    nothing to learn from and are left out.

    Args:
        max_tokens: Above 0. PlatoLM's is 2,048.
        count: Tokens of one turn; what the template adds to a turn is the caller's to count.
    """
    if max_tokens <= 0:
        raise SpecError(f"expected max_tokens above 0, got {max_tokens!r}")

    def apply(conversation: Conversation) -> list[Conversation]:
        messages = conversation.dialogue.messages
        spans = segments([m.role == "user" for m in messages], [count(m.content) for m in messages], max_tokens)
        if spans == [(0, len(messages))]:
            return [conversation]
        parts = [Dialogue(messages[start:end]) for start, end in spans]
        parts = [part for part in parts if part.turns]
        return [
            replace(conversation, id=f"{conversation.id}#{k}" if k else conversation.id, dialogue=p) for k, p in enumerate(parts)
        ]

    return Step("segment", apply)


def segments(is_user: Sequence[bool], lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Where to cut a dialogue: `(start, end)` of each segment, `end` exclusive.

    Turns add up until one overflows. A user's turn that does ends the segment before it, and the next one starts on the
    reply before it, which is repeated. A reply that does still belongs to its segment, and the next one starts on it. So
    every segment ends on a reply and every continuation starts on one; a user's last turn is left out, and one that
    overflows leaves no segment behind (PlatoLM, `split_long_conversation.py`; USP A.1).

    Example:
        >>> segments([True, False, True, False], [4, 4, 4, 1], max_tokens=10)  # the second question overflows
        [(0, 2), (1, 4)]
    """
    spans: list[tuple[int, int]] = []
    start = total = 0
    for i, (user, length) in enumerate(zip(is_user, lengths, strict=True)):
        over, last = total + length > max_tokens, i == len(lengths) - 1
        total += length
        if over or last:
            spans.append((start, i if user else i + 1))
        if over and i > 0:  # an opening that is too long by itself has no reply to restart on
            start = i - 1 if user else i
            total = length + lengths[i - 1] if user else length
    return [span for span in spans if span[1] > span[0]]


def length(
    *,
    min_turns: int = 1,
    max_turns: int | None = None,
    max_chars: int | None = None,
    max_user_chars: int | None = None,
    opens: bool = False,
) -> Step:
    """Drop conversations that are too short, too long, or that hold a turn that is too long.

    Args:
        min_turns: Fewest user turns.
        max_turns: Most user turns.
        max_chars: Most characters of any turn.
        max_user_chars: Most characters of a user's turn.
        opens: Whether the user has to speak first, as in a conversation that is no continuation.
    """

    def apply(conversation: Conversation) -> list[Conversation]:
        dialogue = conversation.dialogue
        fits = (
            min_turns <= dialogue.turns
            and (max_turns is None or dialogue.turns <= max_turns)
            and (max_chars is None or all(len(m.content) <= max_chars for m in dialogue))
            and (max_user_chars is None or all(len(said) <= max_user_chars for said in dialogue.utterances("user")))
            and (not opens or (len(dialogue) > 0 and dialogue[0].role == "user"))
        )
        return [conversation] if fits else []

    return Step("length", apply)
