"""The directory of a run that fits a language model: what is trained there, and where to go on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from usp_env.errors import RunDirectoryError, SpecError

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
    try:
        known, wanted = dict(json.loads((args.out / ARGUMENTS).read_text("utf-8"))), arguments(args)
    except (ValueError, TypeError) as error:
        raise RunDirectoryError(f"{args.out / ARGUMENTS}: expected a run's arguments, it is damaged ({error})") from error
    keys = sorted({*known, *wanted}.difference(FREE))
    if differ := [f"{key} {known.get(key)!r}, now {wanted.get(key)!r}" for key in keys if known.get(key) != wanted.get(key)]:
        raise RunDirectoryError(f"--resume: {args.out} was begun with other arguments: {'; '.join(differ)}")
    return str(whole[-1]) if whole else None


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
