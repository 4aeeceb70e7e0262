"""The files of an extraction: a bank that grows line by line, what was dropped, and the configuration of the run.

A line is appended as a whole; what a crash cut off is removed when the files are opened again. The bank is locked meanwhile: one
process writes it at a time, a second one waits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from usp_env.errors import ProfileFormatError, RunDirectoryError
from usp_env.files import locked


def files_of(out: str | Path) -> tuple[Path, Path, Path]:
    """The files of a run: the bank, what was dropped, the configuration.

    Example:
        >>> [path.name for path in files_of("people.jsonl")]
        ['people.jsonl', 'people.jsonl.dropped.jsonl', 'people.jsonl.run.json']
    """
    return Path(out), Path(f"{out}.dropped.jsonl"), Path(f"{out}.run.json")


@dataclass
class BankFiles:
    """The open files of a run, and which ids they hold."""

    bank: IO[bytes]
    dropped: IO[bytes]
    done: set[str]

    def keep(self, record: Mapping[str, Any]) -> None:
        """Append a profile."""
        self._append(self.bank, record)

    def drop(self, id: str, reason: str) -> None:
        """Append a loss."""
        self._append(self.dropped, {"id": id, "reason": reason})

    def _append(self, stream: IO[bytes], record: Mapping[str, Any]) -> None:
        stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        stream.flush()

    def sync(self) -> None:
        """Bring what was written to the disk."""
        for stream in (self.bank, self.dropped):
            os.fsync(stream.fileno())


@contextmanager
def opened(out: Path, settings: Mapping[str, Any], resume: bool, overwrite: bool, retry_dropped: bool) -> Iterator[BankFiles]:
    """The files of a run, for as long as the block runs; `settings` are recorded, or compared with what is recorded.

    Raises:
        RunDirectoryError: The files exist and may not be used as asked.
        ProfileFormatError: A line in the middle is damaged.
    """
    _, dropped, run = files_of(out)
    if any(file.exists() for file in (out, dropped, run)) and not (resume or overwrite):
        raise RunDirectoryError(
            f"{str(out)!r} (or a file of its run) exists: choose another, go on with it (--resume), or begin anew (--overwrite)"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        bank = stack.enter_context(open(out, "a+b"))
        locked(bank)  # until it is closed; the configuration is read and written under it too
        losses = stack.enter_context(open(dropped, "a+b"))
        if overwrite:
            for stream in (bank, losses):
                stream.truncate(0)
        elif run.exists():
            _check_settings(run, settings)
        elif bank.seek(0, os.SEEK_END) and not overwrite:
            raise RunDirectoryError(
                f"{str(out)!r} is no extraction that could be resumed ({run.name} is missing): choose another"
            )
        done = set(_ids(bank, out))  # first: what is damaged must not cost the losses
        if retry_dropped:
            losses.truncate(0)
        done.update(_ids(losses, dropped))
        fresh = run.with_name(f"{run.name}.new")
        fresh.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", "utf-8")
        fresh.replace(run)
        yield BankFiles(bank, losses, done)


def _check_settings(run: Path, settings: Mapping[str, Any]) -> None:
    try:
        old = json.loads(run.read_text("utf-8"))
        changed = [
            f"{k}: {old.get(k)!r} → {settings.get(k)!r}" for k in sorted({*old, *settings}) if old.get(k) != settings.get(k)
        ]
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RunDirectoryError(f"{run}: expected the configuration of an extraction, it is damaged ({error})") from error
    if changed:
        raise RunDirectoryError(f"{run}: the run had another configuration ({'; '.join(changed)}): use another --out")


def _ids(stream: IO[bytes], path: Path) -> Iterator[str]:
    """The ids in a file; a last line that a crash cut off is removed."""
    stream.seek(0)
    whole = 0
    for number, line in enumerate(stream, 1):  # a binary file's lines end in "\n" alone
        if not line.endswith(b"\n"):
            break
        whole += len(line)
        try:
            yield str(json.loads(line)["id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProfileFormatError(f"{path}, line {number}: expected a JSON object with an 'id' ({error!r})") from error
    stream.truncate(whole)
    stream.seek(0, os.SEEK_END)
