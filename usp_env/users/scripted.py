"""Speakers that follow a script: no model, no randomness. For tests, examples and the core-only install.

A script file is JSONL, one conversation a line: `{"user": ["hi", …], "assistant": ["Hello!", …]}`. The line is
chosen by the user's profile (user seat) or by the opening (assistant seat), so it is the same in every run. A
scripted user ends the conversation after its last line; a scripted assistant begins again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from usp_env.dialogue import Role, View
from usp_env.errors import MissingAssetError, SpecError
from usp_env.files import read_text
from usp_env.records import Reply

Script = dict[str, list[str]]


@dataclass(frozen=True)
class ScriptedSpeaker:
    """Speaks one side from a script.

    Args:
        scripts: The conversations to choose from.
        role: The side it speaks.
        spec: Recorded in transcripts.

    Example:
        >>> from usp_env.dialogue import Dialogue
        >>> user = ScriptedSpeaker(({"user": ["hi", "bye"], "assistant": ["Hello!"]},), "user")
        >>> user.respond([Dialogue().view_for("user")], [0])[0].text
        'hi'
    """

    scripts: tuple[Script, ...]
    role: Role = "user"
    spec: str = "scripted"

    @classmethod
    def load(cls, file: str | None, role: Role) -> ScriptedSpeaker:
        """Read a script file; the packaged one without a name."""
        if file is None:
            text = (resources.files("usp_env.data") / "scripts.jsonl").read_text("utf-8")
            return cls(_parse(text, "scripts.jsonl"), role)
        path = Path(file)
        if not path.is_file():
            raise MissingAssetError(f"scripted:{file}: expected a script file (JSONL), there is none of that name")
        return cls(_parse(read_text(path, SpecError), file), role, f"scripted:{file}")

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """The script's next line for each view."""
        return [self._reply(view) for view in views]

    def _reply(self, view: View) -> Reply:
        said = sum(message.role == self.role for message in view.messages)
        key = view.profile.id if view.profile is not None else (view.messages[0].content if view.messages else "")
        lines = self.scripts[zlib.crc32(key.encode("utf-8", "replace")) % len(self.scripts)][self.role]
        if self.role == "user":
            return Reply(lines[said]) if said < len(lines) else Reply("", ended=True)
        return Reply(lines[said % len(lines)])


def _parse(text: str, file: str) -> tuple[Script, ...]:
    scripts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}: expected {{'user': [texts], 'assistant': [texts]}}"
        try:
            script = json.loads(line)
        except ValueError as error:
            raise SpecError(f"{where}, got {line[:80]!r} ({error})") from error
        for role in ("user", "assistant"):
            lines = script.get(role) if isinstance(script, dict) else None
            if not isinstance(lines, list) or not lines or not all(isinstance(item, str) and item.strip() for item in lines):
                raise SpecError(f"{where}, field {role!r} is {lines!r:.80}")
        scripts.append(script)
    if not scripts:
        raise SpecError(f"{file}: expected at least one conversation, found none")
    return tuple(scripts)
