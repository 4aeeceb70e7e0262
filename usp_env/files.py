"""Reading, writing and locking files; what every reader and writer of the project shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from usp_env.errors import UspError


def read_text(path: str | Path, error: type[UspError]) -> str:
    """The text of a UTF-8 file, a byte order mark left out.

    Args:
        path: An existing file.
        error: Raised where the file is not UTF-8.
    """
    return decode(Path(path).read_bytes(), path, error)


def decode(data: bytes, path: str | Path, error: type[UspError]) -> str:
    """The text of bytes that were read from `path`; see `read_text`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{path}: expected UTF-8 text, got byte 0x{data[cause.start]:02x} at {cause.start}: save the file as UTF-8"
        ) from cause


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.write_text(text, "utf-8")
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def locked(stream: Any) -> None:
    """Hold an advisory lock on an open file until it is closed, where the system has them."""
    try:
        import fcntl
    except ImportError:  # Windows: appends of one process are still whole
        return
    fcntl.flock(stream, fcntl.LOCK_EX)
