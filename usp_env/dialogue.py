"""Messages, dialogues and the two views of a dialogue. Immutable, no I/O.

Roles are always the true ones: the person is `user`, the model that helps is `assistant`, whoever of
them is trained. `View` is what one side may see: the user sees its profile, the assistant never does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from usp_env.errors import SpecError
from usp_env.profiles import Profile

Role = Literal["user", "assistant"]
END = "<|endconversation|>"
"""A text action in the user seat that ends in this marker ends the conversation."""

# C0 without tab and newline, DEL, C1 (0x9b opens an escape sequence as ESC [ does), lone surrogates, and the
# embeddings, overrides and isolates that show text in another order than it was said.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_THINK = re.compile(r"<think>.*?(?:</think>\s*|\Z)", re.DOTALL)


def other(role: Role) -> Role:
    """The other side of the conversation."""
    return "assistant" if role == "user" else "user"


def strip_think(text: str) -> str:
    """Text without its `<think>…</think>` blocks; an unclosed block runs to the end.

    A block that only closes began in the template's generation header: everything before its end is thought.

    Example:
        >>> strip_think("<think>hm</think> Paris.")
        'Paris.'
    """
    head, close, rest = text.partition("</think>")
    while close and "<think>" not in head:  # a loop: a model may say it a thousand times
        text = rest.lstrip()
        head, close, rest = text.partition("</think>")
    return _THINK.sub("", text) if "<think>" in text else text


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # ␀ … ␟
    return "␡" if code == 0x7F else f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def visible(text: object) -> str:
    r"""Text whose control characters have become visible ones: it can drive no terminal and hide nothing.

    Example:
        >>> visible("\x1b[31mred\x07"), visible("a\u202eb")
        ('␛[31mred␇', 'a\\u202eb')
    """
    return _CONTROL.sub(_picture, str(text).replace("\r\n", "\n"))


def split_end(text: str) -> tuple[str, bool]:
    """Text without a final `END` marker, and whether there was one.

    Example:
        >>> split_end("thanks, bye <|endconversation|>")
        ('thanks, bye', True)
    """
    bare = text.rstrip()
    return (bare[: -len(END)].rstrip(), True) if bare.endswith(END) else (text, False)


@dataclass(frozen=True, slots=True)
class Message:
    """One utterance.

    Args:
        role: `"user"` or `"assistant"`.
        content: What the other side, rewards and metrics read.
        raw: What was emitted (with thoughts, untrimmed), where that differs from `content`.
        token_ids: The ids the engine sampled, end token included.
        logprobs: Log-probability of each id under the sampling distribution, same length.
        finish_reason: Why the engine stopped (`Generation.finish_reason`).
        usage: Token counts: `prompt_tokens`, `completion_tokens`, …
        notes: What the engine had to do to the request (`Generation.notes`).
    """

    role: Role
    content: str
    raw: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    finish_reason: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def chat(self, keep_think: bool = False) -> dict[str, str]:
        """A fresh `{"role", "content"}` dict; `keep_think=True` shows the speaker its own thoughts."""
        if keep_think and self.raw is not None:
            return {"role": self.role, "content": split_end(self.raw)[0]}
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """An immutable conversation between a user and an assistant.

    Args:
        messages: In order. `Dialogue.of` takes plain dicts.

    Example:
        >>> dialogue = Dialogue.of([{"role": "user", "content": "hi"}]).add(Message("assistant", "Hello!"))
        >>> dialogue.turns, dialogue.utterances("assistant")
        (1, ['Hello!'])
    """

    messages: tuple[Message, ...] = ()

    @classmethod
    def of(cls, messages: Iterable[Message | Mapping[str, Any]]) -> Dialogue:
        """Build a dialogue from messages or `{"role", "content"}` dicts.

        Raises:
            SpecError: A role is neither `user` nor `assistant`, or a content is no string.
        """
        return cls(tuple(m if isinstance(m, Message) else _message(m, i) for i, m in enumerate(messages)))

    def add(self, message: Message) -> Dialogue:
        """This dialogue with one more message."""
        return Dialogue((*self.messages, message))

    @property
    def turns(self) -> int:
        """Number of user utterances: a turn is one user utterance."""
        return sum(message.role == "user" for message in self.messages)

    def utterances(self, role: Role) -> list[str]:
        """What one side said, in order."""
        return [message.content for message in self.messages if message.role == role]

    def view_for(self, role: Role, profile: Profile | None = None, options: Mapping[str, Any] | None = None) -> View:
        """The dialogue as one side sees it: only the user's side holds the profile."""
        return View(role, self.messages, profile if role == "user" else None, options or {})

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def __getitem__(self, index: int) -> Message:
        return self.messages[index]


@dataclass(frozen=True, slots=True)
class View:
    """What the side that speaks next may see.

    Args:
        role: Who speaks next.
        messages: The conversation so far, true roles.
        profile: The user's profile when `role == "user"`, else None.
        options: The sampler's `user_options` (e.g. a patience), for the simulated user only.
    """

    role: Role
    messages: Sequence[Message]
    profile: Profile | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def opening(self) -> bool:
        """Whether nothing has been said yet."""
        return not self.messages


def _message(record: Mapping[str, Any], index: int) -> Message:
    role, content = (record.get("role"), record.get("content")) if isinstance(record, Mapping) else (None, None)
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise SpecError(f"message {index}: expected a role 'user' or 'assistant' and a content string, got {record!r:.120}")
    return Message(role, content)


class Act(str):
    """A text action that carries what the agent's engine knows into the transcript.

    Args:
        text: The utterance.
        token_ids: The ids the engine sampled, end token included.
        logprobs: One per id.
        finish_reason: Why the engine stopped.
        usage: Token counts.

    Example:
        >>> act = Act("hello", token_ids=(5, 2), finish_reason="stop")
        >>> act == "hello", act.token_ids
        (True, (5, 2))
    """

    token_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    finish_reason: str | None
    usage: Mapping[str, int]

    def __new__(
        cls,
        text: str,
        token_ids: Sequence[int] | None = None,
        logprobs: Sequence[float] | None = None,
        finish_reason: str | None = None,
        usage: Mapping[str, int] | None = None,
    ) -> Act:
        """Make the string and hang the engine's facts on it."""
        act = super().__new__(cls, text)
        act.token_ids = None if token_ids is None else tuple(token_ids)
        act.logprobs = None if logprobs is None else tuple(logprobs)
        act.finish_reason = finish_reason
        act.usage = dict(usage or {})
        return act


USP_SYSTEM_PROMPT = (
    "You are engaging in a conversation with an AI assistant. Your profile is: \n{profile}\n "
    "You can say anything you want, either based on the profile or something brand new.\n\n"
)
"""The inference form of USP's system prompt (released weights, `examples/user_simulator.py`)."""

OPENER = "What will you say to start the conversation?"
"""The query that makes an assistant model, which cannot open a conversation, play the user's first turn (paper B.3)."""


def system_message(profile: Profile) -> dict[str, str]:
    """The system message that gives the user's side its profile."""
    return {"role": "system", "content": USP_SYSTEM_PROMPT.format(profile=profile)}


def flip(messages: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """A user's conversation for a stock chat template: own turns are `assistant`, the opener shim comes first.

    Example:
        >>> [m["role"] for m in flip([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}])]
        ['user', 'assistant', 'user']
    """
    flipped = ({"role": other(m["role"]), "content": m["content"]} for m in messages)  # type: ignore[arg-type]
    return [{"role": "user", "content": OPENER}, *flipped]
