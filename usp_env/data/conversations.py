"""Real conversations: one typed record, and loaders for the layouts in which conversations are published.

`load` streams: no file or data set is ever held whole. What a conversation says is kept as it is, but for ShareGPT's
export artefacts (`usp_env.data.cleaning`); what to leave out is `usp_env.data.preprocessing`'s to decide and to count.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from usp_env.data.cleaning import clean_dialogue
from usp_env.data.formats import FORMATS, Conversation, detect, record_id
from usp_env.data.records import SUFFIXES, Place, hub_records, read_records
from usp_env.dialogue import Dialogue
from usp_env.errors import MissingAssetError, UnknownNameError
from usp_env.models import assets
from usp_env.profiles import PACKAGED, Profile, ProfileBank, reserved_ids

__all__ = ["FORMATS", "HUB", "Conversation", "continued", "group_id", "join", "load", "segment_of"]

HUB = {
    "lmsys-usp": "wangkevin02/LMSYS-USP",
    "lmsys-chat-1m": "lmsys/lmsys-chat-1m",
    "wildchat": "allenai/WildChat-1M",
    "personachat": "bavard/personachat_truecased",
}
"""Short names of hub data sets; `load` takes these and any `owner/name`."""

_PART = re.compile(r"#([0-9]+)\Z")
# A capital or a digit, as all but 22 of 9,460 have: `session_1` and `session_2` of somebody's own are two people.
_SHAREGPT = re.compile(r"((?=[a-z]*[A-Z0-9])[A-Za-z0-9]{7})_([0-9]+)")
_COPIES = ("7y4qwfF_0", "Yvazhj1_0", "izuEpAx_0", "l4hcvI5_0", "msKmANJ_0", "w2jVd6l_0")
"""Conversations of the ShareGPT package that are a reserved one again, wholly (5) or from the same long opening on (1)."""


def load(
    source: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    reserved: bool = False,
    clean: bool = True,
    ids: Collection[str] | None = None,
) -> Iterator[Conversation]:
    """Stream the conversations of a source, in its order.

    Args:
        source: `"sharegpt"` (the fetched asset; any packaged bank's name stands for it), a file (`.json`, `.jsonl`, both also
            `.gz`, `.parquet`), or a data set of the hub: a name of `HUB` or any `owner/name`.
        format: A name of `FORMATS`; `"auto"` decides by each record's keys.
        split: For the hub its split (default `"train"`), for a file the records whose `split` this is.
        reserved: Also give the conversations that are kept for an independent check, with their later segments and
            copies. Nothing may train on them.
        clean: Mend ShareGPT's export artefacts; other formats have none and stay as they are.
        ids: Only these conversations; the others are not even built, which makes this the fast way to a bank's.

    Raises:
        ConversationFormatError: A record breaks its format; the message names file, line and field.
        UnknownNameError: The format has no such name.
        MissingAssetError: The source is not on this machine.
        MissingExtraError: The source needs a package that is not installed.
    """
    if format not in ("auto", *FORMATS):
        raise UnknownNameError("format", format, ("auto", *FORMATS))
    out: frozenset[str] = frozenset() if reserved else _reserved_groups()
    return _load(_open(source, split), format, out, clean, ids)


def join(
    bank: ProfileBank, conversations: Iterable[Conversation], *, missing: Literal["raise", "warn"] = "raise"
) -> Iterator[tuple[Profile, Dialogue]]:
    """The conversations that a bank's profiles were read from, in the order in which the stream brings them.

    Of conversations that share an id the first counts, and reading stops once every profile has its own.

    Args:
        bank: The profiles; a profile belongs to the conversation with its id.
        conversations: E.g. `load("sharegpt", ids={profile.id for profile in bank})`.
        missing: What to do about profiles without a conversation, once the stream has ended.

    Raises:
        MissingAssetError: Profiles have no conversation and `missing` is `"raise"`.
    """
    open_ids = {profile.id for profile in bank}
    for conversation in conversations:
        if conversation.id in open_ids:
            open_ids.remove(conversation.id)
            yield bank.get(conversation.id), conversation.dialogue
            if not open_ids:
                return
    if open_ids:
        shown = ", ".join(sorted(open_ids)[:5])
        message = f"bank {bank.name!r}: {len(open_ids)} of {len(bank)} profiles have no conversation in the source ({shown}, …)"
        if missing == "raise":
            raise MissingAssetError(f"{message}: pass missing='warn' to go on without them")
        warnings.warn(message, stacklevel=2)


def segment_of(id: str) -> tuple[str, tuple[int, int]]:
    """The conversation that an id is a segment of, and which: ShareGPT's `_<turn>`, then `preprocessing.segment`'s `#<k>`.

    Example:
        >>> segment_of("QWJhYvA_9#2"), segment_of("chat_9")
        (('QWJhYvA', (9, 2)), ('chat_9', (0, 0)))
    """
    part = _PART.search(id)
    whole = id[: part.start()] if part else id
    found = _SHAREGPT.fullmatch(whole)
    group, turn = found.groups() if found else (whole, 0)
    return group, (int(turn), int(part[1]) if part else 0)


def continued(source: str | Path) -> frozenset[str]:
    """Ids of a source's conversations that go on in a later segment: where they stop, the person did not.

    Args:
        source: As in `load`; it is read once, and no conversation is built.
    """
    ids = {record_id(record, place) for place, record in _open(source, None)}
    last: dict[str, tuple[int, int]] = {}
    for group, at in map(segment_of, ids):
        last[group] = max(at, last.get(group, at))
    return frozenset(id for id in ids for group, at in [segment_of(id)] if at < last[group])


def group_id(id: str) -> str:
    """What the segments of one conversation share: `segment_of` without which.

    Split by it: the segments `QWJhYvA_0` and `QWJhYvA_9` are one person's, and share a turn.

    Example:
        >>> group_id("QWJhYvA_9#2"), group_id("5a1f")
        ('QWJhYvA', '5a1f')
    """
    return segment_of(id)[0]


@cache
def _reserved_groups() -> frozenset[str]:
    return frozenset(group_id(id) for id in (*reserved_ids(), *_COPIES))


def _open(source: str | Path, split: str | None) -> Iterator[tuple[Place, dict[str, Any]]]:
    if source in PACKAGED:
        (file,) = (f for f in assets.path("sharegpt").iterdir() if f.suffix == ".json" and f.name != assets.MANIFEST)
        return read_records(file, "sharegpt", split, cut_off=True)
    if Path(source).is_file():
        return read_records(Path(source), str(source), split)
    name = str(source)
    if name in HUB or (name.count("/") == 1 and Path(name).suffix not in SUFFIXES):
        # PersonaChat's main branch holds a loading script, which `datasets` no longer runs; the hub converted its rows.
        where = {"revision": "refs/convert/parquet", "data_dir": "full"} if name == "personachat" else {}
        return hub_records(HUB.get(name, name), split or "train", **where)
    raise MissingAssetError(
        f"expected {', '.join(PACKAGED)}, a file, one of {', '.join(HUB)} or a hub data set 'owner/name', got {name!r}"
    )


def _load(
    records: Iterator[tuple[Place, dict[str, Any]]], format: str, out: Collection[str], clean: bool, ids: Collection[str] | None
) -> Iterator[Conversation]:
    for place, record in _last_of_each_dialogue(records):
        name = detect(record, place) if format == "auto" else format
        id = record_id(record, place)
        if group_id(id) in out or (ids is not None and id not in ids):
            continue
        conversation = FORMATS[name](id, record, place)
        if clean and name == "sharegpt":
            conversation = replace(conversation, dialogue=clean_dialogue(conversation.dialogue))
        yield conversation


def _last_of_each_dialogue(records: Iterator[tuple[Place, dict[str, Any]]]) -> Iterator[tuple[Place, dict[str, Any]]]:
    # PersonaChat on the hub has a row for every utterance; the last row of a `conv_id` holds the whole dialogue.
    held: tuple[Place, dict[str, Any]] | None = None
    for place, record in records:
        if held and ("utterance_idx" not in record or record.get("conv_id") != held[1].get("conv_id")):
            yield held
            held = None
        if "utterance_idx" in record:
            held = place, record
        else:
            yield place, record
    if held:
        yield held
