"""The typed record of a conversation, and what reads each layout in which conversations are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from usp_env.data.records import Place
from usp_env.data.second_person import second_person
from usp_env.dialogue import Dialogue, Message, Role
from usp_env.profiles import Profile

_ROLES: dict[str, Role | Literal["system"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One recorded conversation and what its source knows about it.

    Args:
        id: As in the source; where it has none, `"<file>:<number>"` or, on the hub, `"<data set>:<split>:<number>"`.
        dialogue: The turns, true roles.
        profile: Who the person is, where the source says so.
        user_id: Groups several conversations of one person.
        language: As the source spells it (`"English"`, `"en"`), or None.
        toxic: What the source's moderation says, or None.
        source: The file or data set.
        system: The system message, where there is one.
    """

    id: str
    dialogue: Dialogue
    profile: Profile | None = None
    user_id: str | None = None
    language: str | None = None
    toxic: bool | None = None
    source: str = ""
    system: str | None = None


def detect(record: dict[str, Any], place: Place) -> str:
    """The format whose keys a record has.

    Raises:
        ConversationFormatError: None has them.
    """
    for name, keys in _KEYS.items():
        if all(key in record and (kind is object or isinstance(record[key], kind)) for key, kind in keys.items()):
            return name
    raise place.bad("(keys)", f"the keys of one of {', '.join(FORMATS)}", sorted(record))


def record_id(record: dict[str, Any], place: Place) -> str:
    """The conversation's id, or one made of its place where the source has none."""
    for key in ("id", "conversation_id", "conversation_hash", "conv_id"):
        if (value := record.get(key)) is not None:
            if not isinstance(value, str | int) or value == "":
                raise place.bad(key, "a non-empty string", value)
            return place.text(str(value), key)
    return ":".join(filter(None, (Path(place.file).name, place.split, str(place.number))))


def _turns(
    record: dict[str, Any], place: Place, field: str, role_key: str = "role", text_key: str = "content"
) -> tuple[Dialogue, str | None]:
    """The dialogue in `record[field]`, and the system message before it."""
    turns = record.get(field)
    if not isinstance(turns, list):
        raise place.bad(field, "a list of messages", turns)
    messages: list[Message] = []
    system: str | None = None
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise place.bad(f"{field}[{i}]", f"an object with {role_key!r} and {text_key!r}", turn)
        said, text = turn.get(role_key), turn.get(text_key)
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None or (role == "system" and i > 0):
            known = ", ".join(sorted(set(_ROLES)))
            raise place.bad(f"{field}[{i}].{role_key}", f"one of {known} (a system message only at the start)", said)
        text = place.text(text, f"{field}[{i}].{text_key}")
        if role == "system":
            system = text
        else:
            messages.append(Message(role, text))
    return Dialogue(tuple(messages)), system


def _sharegpt(id: str, record: dict[str, Any], place: Place) -> Conversation:
    dialogue, system = _turns(record, place, "conversations", "from", "value")
    return Conversation(id, dialogue, user_id=_user_id(record, place), source=place.file, system=system)


def _openai(id: str, record: dict[str, Any], place: Place) -> Conversation:
    dialogue, system = _turns(record, place, "messages")
    return Conversation(id, dialogue, user_id=_user_id(record, place), source=place.file, system=system)


def _bank(id: str, record: dict[str, Any], place: Place) -> Conversation:
    prose = record.get("profile")
    if not isinstance(prose, dict):
        raise place.bad("profile", "an object with 'objective' and 'subjective'", prose)
    objective, subjective = (place.text(prose.get(key), f"profile.{key}") for key in ("objective", "subjective"))
    attributes: dict[str, Any] | None = {
        key: record[key] for key in ("objective_facts", "subjective_characteristics") if key in record
    } or None
    user_id = _user_id(record, place)
    profile = Profile(id, objective, subjective, attributes, record.get("split"), user_id, place.file)
    dialogue, system = _turns(record, place, "conversation")
    return Conversation(id, dialogue, profile, user_id, source=place.file, system=system)


def _lmsys_usp(id: str, record: dict[str, Any], place: Place) -> Conversation:
    # The first paragraph holds the objective facts, the last the subjective characteristics.
    paragraphs = [p.strip() for p in place.text(record.get("profile"), "profile").split("\n") if p.strip()]
    if not paragraphs:
        raise place.bad("profile", "two paragraphs of text", record.get("profile"))
    objective = "\n".join(paragraphs[:-1]) or paragraphs[0]
    profile = Profile(id, objective, paragraphs[-1] if len(paragraphs) > 1 else "", source=place.file)
    dialogue, system = _turns(record, place, "conversation")
    return Conversation(id, dialogue, profile, _user_id(record, place), source=place.file, system=system)


def _lmsys_chat(id: str, record: dict[str, Any], place: Place) -> Conversation:
    flags = record.get("openai_moderation")
    if flags is not None and not (isinstance(flags, list) and all(isinstance(f, Mapping) for f in flags)):
        raise place.bad("openai_moderation", "a list of objects with 'flagged', one a message", flags)
    toxic = None if flags is None else any(flag.get("flagged") for flag in flags)
    dialogue, system = _turns(record, place, "conversation")
    user_id, language = _user_id(record, place), _text_or_none(record, "language", place)
    return Conversation(id, dialogue, None, user_id, language, toxic, place.file, system)


def _wildchat(id: str, record: dict[str, Any], place: Place) -> Conversation:
    dialogue, system = _turns(record, place, "conversation")
    turns = record["conversation"]
    toxic = record.get("toxic")
    if toxic is None and any("toxic" in turn for turn in turns):
        toxic = any(turn.get("toxic") for turn in turns)
    if not isinstance(toxic, bool | None):
        raise place.bad("toxic", "true, false or none", toxic)
    user_id = _text_or_none(record, "hashed_ip", place)
    if user_id is None:
        user_id = next((place.text(t["hashed_ip"], "hashed_ip") for t in turns if isinstance(t.get("hashed_ip"), str)), None)
    if user_id is None:
        user_id = _user_id(record, place)
    return Conversation(id, dialogue, None, user_id, _text_or_none(record, "language", place), toxic, place.file, system)


def _personachat(id: str, record: dict[str, Any], place: Place) -> Conversation:
    rows = record.get("utterances")
    last = rows[-1] if isinstance(rows, list) and rows else record
    texts: list[str] = []
    for key in ("history", "candidates"):
        value = last.get(key) if isinstance(last, Mapping) else None
        if not isinstance(value, list) or not value:
            raise place.bad(key, "a non-empty list of texts", value)
        texts += [place.text(text, f"{key}[{i}]") for i, text in enumerate(value if key == "history" else value[-1:])]
    # The persona is that of whoever says the candidates, of which the last is the true one: they are the user.
    messages = [Message("user" if (len(texts) - 1 - i) % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    if texts[0].replace(" ", "") == "__SILENCE__":  # ParlAI's sign that the other side opens
        messages = messages[1:]
    persona = record.get("personality")
    if not isinstance(persona, list) or not persona:
        raise place.bad("personality", "a non-empty list of sentences", persona)
    prose = " ".join(second_person(place.text(line, f"personality[{i}]")) for i, line in enumerate(persona))
    return Conversation(id, Dialogue(tuple(messages)), Profile(id, prose, "", source=place.file), source=place.file)


def _user_id(record: dict[str, Any], place: Place) -> str | None:
    """Whose conversation it is, where the record says so: banks are split by it, so it must not be lost."""
    value = record.get("user_id")
    if type(value) is int:
        return str(value)
    return None if value is None or value == "" else place.text(value, "user_id")


def _text_or_none(record: dict[str, Any], field: str, place: Place) -> str | None:
    return None if record.get(field) is None else place.text(record[field], field)


FORMATS: dict[str, Callable[[str, dict[str, Any], Place], Conversation]] = {
    "sharegpt": _sharegpt,
    "lmsys-usp": _lmsys_usp,
    "lmsys-chat-1m": _lmsys_chat,
    "wildchat": _wildchat,
    "personachat": _personachat,
    "openai": _openai,
    "bank": _bank,
}
"""What reads a record of each published layout."""

_KEYS: dict[str, dict[str, type]] = {
    "sharegpt": {"conversations": object},
    "bank": {"profile": dict, "conversation": object},
    "lmsys-usp": {"profile": str, "conversation": object},
    "wildchat": {"conversation_hash": object, "conversation": object},
    "lmsys-chat-1m": {"conversation_id": object, "conversation": object},
    "personachat": {"personality": object},
    "openai": {"messages": object},
}
