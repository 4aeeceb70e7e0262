"""The directory of a run that fits a language model: what is trained there, and where to go on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from usp_env.errors import RunDirectoryError, SpecError
from usp_env.files import write_whole

ARGUMENTS = "arguments.json"  # what a run directory is trained with
FREE = ("out", "resume", "gradient_checkpointing")  # arguments that change nothing of what is trained


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON holds them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def check_folders(*files: Path | None) -> None:
    """Refuse files that could not be written when all is measured, before anything is.

    Raises:
        SpecError: The folder of one is not there, or it is a folder itself.
    """
    for file in files:
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise SpecError(f"{file}: expected a file in a folder that is there")


def last_checkpoint(args: argparse.Namespace) -> str | None:
    """The checkpoint to go on from, if there is a whole one.

    Raises:
        RunDirectoryError: There is one without `--resume`, or of a run with other arguments.
    """
    found = sorted((folder for folder in args.out.glob("checkpoint-*") if _step(folder) >= 0), key=_step)
    whole = [folder for folder in found if _state(folder) is not None]
    if not found:
        return None
    if not args.resume:
        raise RunDirectoryError(f"--out {args.out} holds checkpoints of an earlier run: take another, or --resume to go on")
    if not (args.out / ARGUMENTS).is_file():
        raise RunDirectoryError(f"--out {args.out} holds checkpoints and no {ARGUMENTS}, so what they are of: take another")
    check_same(args, FREE)
    return str(whole[-1]) if whole else None


def check_same(args: argparse.Namespace, free: Sequence[str]) -> None:
    """Whether a run that goes on was begun with these arguments.

    Args:
        args: With `out`.
        free: Arguments that may differ.

    Raises:
        RunDirectoryError: It was not; the message names each difference.
    """
    try:
        known, wanted = dict(json.loads((args.out / ARGUMENTS).read_text("utf-8"))), json.loads(json.dumps(arguments(args)))
    except (ValueError, TypeError) as error:
        raise RunDirectoryError(f"{args.out / ARGUMENTS}: expected a run's arguments, it is damaged ({error})") from error
    keys = sorted({*known, *wanted}.difference(free))
    if differ := [f"{key} {known.get(key)!r}, now {wanted.get(key)!r}" for key in keys if known.get(key) != wanted.get(key)]:
        raise RunDirectoryError(f"--resume: {args.out} was begun with other arguments: {'; '.join(differ)}")


def begin(args: argparse.Namespace, free: Sequence[str]) -> None:
    """Take the run directory, or see that the run that goes on in it is this one.

    Args:
        args: With `out` and `resume`.
        free: Arguments that may differ when a run goes on.

    Raises:
        RunDirectoryError: `out` holds something and `--resume` was not given, or a run with other arguments; or it cannot be
            written.
    """
    try:
        if (args.out / ARGUMENTS).is_file() and args.resume:
            return check_same(args, free)
        if args.out.is_dir() and any(args.out.iterdir()):
            raise RunDirectoryError(
                f"--out {args.out} holds files of something else: take another, or --resume what was begun there"
            )
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(args.out / ARGUMENTS, json.dumps(arguments(args), indent=1) + "\n")
    except RunDirectoryError:
        raise
    except OSError as error:
        raise RunDirectoryError(f"--out {args.out} cannot be written ({error}): take another") from error


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isascii() and step.isdigit() else -1


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """The trainer's state, the last file that it writes: None where a kill or a full disk left a checkpoint without it."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        return state if isinstance(state["log_history"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def spent(checkpoint: str | None) -> float:
    """Seconds of a run up to its checkpoint, over all its pieces."""
    if checkpoint is None:
        return 0.0
    state = _state(Path(checkpoint)) or {"log_history": []}
    return float(max((entry.get("eval_seconds", 0.0) for entry in state["log_history"]), default=0.0))
