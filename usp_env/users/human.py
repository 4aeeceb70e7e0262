"""A person at the terminal, in either seat: `--assistant human`, `--user human`, `usp-env chat`.

In a terminal `prompt_toolkit` edits the line (a paste of any length and its line breaks stay one message; Alt-Enter
begins a new line); otherwise lines are read from standard input. Whole messages that are commands:

    /end     end the conversation (a right of the user's)
    /quit    leave; so do Ctrl-D and Ctrl-C
    /help    what can be typed
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from usp_env.dialogue import Role, View, other, visible
from usp_env.errors import BackendError, require
from usp_env.records import Reply

_UNSENDABLE = re.compile("[\ud800-\udfff]")  # lone surrogates, which no tokenizer takes
HELP = {
    "user": "Write what you would say to the assistant. /end ends the conversation, /quit leaves.",
    "assistant": "Write what the assistant should answer. Only the user can end the conversation; /quit leaves.",
}


class LeftError(BackendError):
    """The person has left; as a partner's failure it makes the episode an `infra_failure`."""


class HumanSpeaker:
    """Asks a person, one conversation after another.

    Args:
        role: The side that the person speaks.
        read: Given the prompt, returns a line; raises `EOFError` when the person leaves. None reads the terminal.
        show: Prints a line. None writes to standard output.
        max_chars: A longer message is not sent: it would end the episode.
    """

    spec = "human"

    def __init__(
        self,
        role: Role,
        read: Callable[[str], str] | None = None,
        show: Callable[[str, str], None] | None = None,
        max_chars: int = 16_000,
    ) -> None:
        self.role, self._read, self._show, self.max_chars = role, read, show or _print, max_chars

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """What the person types for each view, in order.

        Raises:
            LeftError: The person leaves.
        """
        return [self._reply(view) for view in views]

    def __deepcopy__(self, memo: dict[int, Any]) -> HumanSpeaker:
        return self

    def _reply(self, view: View) -> Reply:
        if view.opening and view.profile is not None:
            self._show("you are", str(view.profile))
        if view.messages and view.messages[-1].role == other(self.role):
            self._show(other(self.role), view.messages[-1].content)
        self._read = self._read or terminal_reader()
        while True:
            try:
                typed = self._read(f"{self.role}> ")
            except (EOFError, KeyboardInterrupt):
                raise LeftError("the person has left the conversation") from None
            match typed.strip():
                case "":
                    self._show("note", "An empty message is not sent. /help tells what can be typed.")
                case "/help":
                    self._show("note", HELP[self.role])
                case "/quit":
                    raise LeftError("the person has left the conversation")
                case "/end" if self.role == "user" and not view.opening:
                    return Reply("", ended=True)
                case "/end":
                    self._show("note", "Only the user can end a conversation, and not before it has begun. /quit leaves.")
                case _ if len(typed) > self.max_chars:
                    self._show("note", f"Not sent: {len(typed):,} characters, and a message has at most {self.max_chars:,}.")
                case _:
                    # What a terminal cannot encode comes as lone surrogates, which no tokenizer takes.
                    return Reply(_UNSENDABLE.sub("\ufffd", _spelled(typed)))


def _spelled(typed: str) -> str:
    """Bytes that the terminal's encoding did not take, read as UTF-8."""
    try:
        return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return typed


def terminal_reader() -> Callable[[str], str]:
    """Reads a message: edited in a terminal, a line of standard input elsewhere."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is no text spoils its character, not the conversation
        return _read_line
    toolkit = require("prompt_toolkit", "report")
    keys = toolkit.key_binding.KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: Any = toolkit.PromptSession(key_bindings=keys)
    return lambda prompt: str(session.prompt(prompt))


def _read_line(prompt: str) -> str:
    sys.stdout.write(prompt)
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _print(who: str, text: str) -> None:
    sys.stdout.write(f"{who}> {visible(text)}\n")
