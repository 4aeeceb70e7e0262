"""Records from files and the hub, one at a time and each with its place: what every loader of conversations reads."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from usp_env.errors import MissingAssetError, UspError, require
from usp_env.models import assets

CHUNK = 1 << 20
"""Characters read at a time."""
SUFFIXES = (".json", ".jsonl", ".gz", ".parquet")
_START = re.compile(r"\s*\[")
_GAP = re.compile(r"[\s,]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


class ConversationFormatError(UspError, ValueError):
    """A conversation breaks its format; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands.

    Args:
        file: The file or data set.
        line: Where it begins, from 1; in a data set its row.
        number: Of the record, from 1.
        split: Of a hub data set, whose splits are each counted from 1; else empty.
    """

    file: str
    line: int
    number: int
    split: str = ""

    def bad(self, field: str, expected: str, came: object) -> ConversationFormatError:
        """The error for a field of this record."""
        return ConversationFormatError(f"{self.file}, line {self.line}, field {field!r}: expected {expected}, got {came!r:.120}")

    def text(self, value: object, field: str) -> str:
        """The value, if it is text that can be written as UTF-8.

        Raises:
            ConversationFormatError: It is not.
        """
        if not isinstance(value, str):
            raise self.bad(field, "a string", value)
        if not value.isascii() and (lone := _SURROGATE.search(value)):
            raise self.bad(field, "valid Unicode", lone[0])
        return value


def read_records(
    path: Path, name: str, split: str | None = None, *, cut_off: bool = False
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The JSON objects of a file in constant memory: `.json` (one array), `.jsonl`, both also `.gz`, or `.parquet`.

    Args:
        path: An existing UTF-8 file.
        name: What places and errors call it.
        split: Give only the records whose field `split` is this.
        cut_off: Whether an array that ends inside an object is expected; else it raises.

    Raises:
        ConversationFormatError: A record is no JSON object, or has no `split` where one is asked for.
        MissingExtraError: A `.parquet` file, and pyarrow is not installed.
    """
    for place, record in _parquet(path, name) if path.suffix == ".parquet" else _json(path, name, cut_off):
        if not isinstance(record, dict):
            raise place.bad("(record)", "a JSON object", record)
        if split is not None and "split" not in record:
            raise place.bad("split", f"the split of each record, as split={split!r} was asked for", None)
        if split is None or record["split"] == split:
            yield place, record


def hub_records(name: str, split: str, **where: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows of a hub data set, streamed.

    Args:
        name: `owner/name`.
        split: E.g. `"train"`.
        where: What else `datasets.load_dataset` needs to find the rows (`revision`, `data_dir`).

    Raises:
        MissingExtraError: `datasets` is not installed.
        MissingAssetError: The network is forbidden (`USP_ENV_OFFLINE`).
    """
    if assets.offline():
        raise MissingAssetError(f"{name!r} is a hub data set and USP_ENV_OFFLINE is set: unset it, or pass a local file")
    rows = require("datasets", "data").load_dataset(name, split=split, streaming=True, **where)
    for number, row in enumerate(rows, 1):
        yield Place(name, number, number, split), dict(row)


def _parquet(path: Path, name: str) -> Iterator[tuple[Place, Any]]:
    number, arrow = 0, require("pyarrow", "data")
    try:
        for batch in require("pyarrow.parquet", "data").ParquetFile(path).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield Place(name, number, number), record
    except (arrow.ArrowException, OSError) as cause:
        raise ConversationFormatError(f"{path}: expected a whole parquet file ({cause}): bring it again") from cause


def _json(path: Path, name: str, cut_off: bool) -> Iterator[tuple[Place, Any]]:
    try:
        # newline="\n": U+2028 and a lone "\r" occur inside text, and a line of JSONL ends on "\n" only.
        opened = gzip.open(path, "rt", encoding="utf-8-sig", newline="\n") if path.suffix == ".gz" else None
        with opened or path.open(encoding="utf-8-sig", newline="\n") as stream:
            lines = ".jsonl" in path.suffixes
            yield from _lines(stream, name) if lines else _array(stream, name, cut_off)
    except UnicodeDecodeError as cause:
        raise ConversationFormatError(f"{path}: expected UTF-8 text ({cause}): save the file as UTF-8") from cause
    except (EOFError, gzip.BadGzipFile, zlib.error) as cause:
        raise ConversationFormatError(f"{path}: expected a whole gzip file ({cause}): bring it again") from cause


def _lines(stream: TextIO, file: str) -> Iterator[tuple[Place, Any]]:
    number = 0
    for at, line in enumerate(stream, 1):
        if line.strip():
            number += 1
            place = Place(file, at, number)
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as cause:
                raise place.bad("(line)", f"one JSON object ({cause})", line) from cause


def _array(stream: TextIO, file: str, cut_off: bool) -> Iterator[tuple[Place, Any]]:
    """The items of a JSON array; the buffer holds one chunk and what is left of the item at its end."""
    decode = json.JSONDecoder().raw_decode
    buffer, want = stream.read(CHUNK), CHUNK
    start = _START.match(buffer)
    if start is None:
        raise Place(file, 1, 1).bad("(file)", "a JSON array ('[' first; one object a line is called .jsonl)", buffer[:40])
    line, position = 1 + start[0].count("\n"), start.end()
    number = 1
    while True:
        gap = _GAP.match(buffer, position)
        begin = gap.end() if gap else position
        line += buffer.count("\n", position, begin)
        position = begin
        if buffer.startswith("]", position):
            return
        try:
            item, end = decode(buffer, position)
        except json.JSONDecodeError as cause:
            more = stream.read(want) if _may_go_on(cause, buffer) else None
            if more:
                buffer, position, want = buffer[position:] + more, 0, want * 2
                continue
            if cut_off and more == "":
                return
            raise Place(file, line, number).bad("(array)", f"a complete JSON object ({cause.msg})", buffer[position:]) from cause
        except (ValueError, RecursionError) as cause:
            raise Place(file, line, number).bad(
                "(array)", f"a JSON object ({cause})", buffer[position : position + 120]
            ) from cause
        yield Place(file, line, number), item
        number += 1
        line += buffer.count("\n", position, end)
        position, want = end, CHUNK


def _may_go_on(error: json.JSONDecodeError, buffer: str) -> bool:
    """Whether the rest of the item may be beyond the buffer: it is cut in a string, or within a token of its end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 12
