"""Private data that has a form: e-mail addresses, phone numbers, public IP addresses, payment card numbers.

Names and postal addresses have none and are not found. Addresses of private networks (192.168.0.1) say nothing of anybody and
stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Literal

from usp_env.dialogue import Dialogue, Message

Pii = Literal["drop", "mask", "keep"]

_PATTERNS: dict[str, re.Pattern[str]] = {
    "e-mail": re.compile(r"(?<![\w+-])\w[\w.+-]{0,63}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    "card": re.compile(r"(?<![\w.-])[2-6](?:[ -]?\d){12,15}(?![\w-]|\.\d)"),
    "ip": re.compile(r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}|(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{0,4})(?![\w:]|\.\d)"),
    "phone": re.compile(
        r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"  # international
        r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4})(?![\w-]|\.\d)"  # North American, with separators
    ),
}


def _luhn(text: str) -> bool:
    digits = [int(char) for char in reversed(text) if char.isdigit()]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * d, 10)) for d in digits[1::2]) % 10 and len(set(digits)) > 1


def _is_public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


_CHECKS: dict[str, Callable[[str], bool]] = {
    "card": _luhn,
    "ip": _is_public,
    "phone": lambda text: 9 <= sum(char.isdigit() for char in text) <= 15,
}


def find(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Kind and place of private data, kind by kind."""
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
            if kind not in _CHECKS or _CHECKS[kind](match[0]):
                yield kind, match


def mask(text: str) -> str:
    """Text whose private data is replaced by its kind.

    Example:
        >>> mask("Mail ann@example.org or call (212) 555-0142, server 8.8.8.8, router 192.168.0.1")
        'Mail [E-MAIL] or call [PHONE], server [IP], router 192.168.0.1'
    """
    for kind, pattern in _PATTERNS.items():
        check = _CHECKS.get(kind)
        mark = f"[{kind.upper()}]"
        text = pattern.sub(lambda match, c=check, m=mark: m if c is None or c(match[0]) else match[0], text)  # type: ignore[misc]
    return text


def kinds(dialogue: Dialogue) -> list[str]:
    """The kinds of private data in a dialogue, sorted."""
    return sorted({kind for message in dialogue for kind, _ in find(message.content)})


def mask_dialogue(dialogue: Dialogue) -> Dialogue:
    """The dialogue with every turn masked."""
    return Dialogue(tuple(Message(message.role, mask(message.content)) for message in dialogue))
