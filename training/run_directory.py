"""The directory of a run that fits a language model: what is trained there, and where to go on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from usp_env.errors import RunDirectoryError
from usp_env.files import write_whole

ARGUMENTS = "arguments.json"  # what a run directory is trained with
FREE = ("out", "resume", "gradient_checkpointing")  # arguments that change nothing of what is trained


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON holds them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def last_checkpoint(args: argparse.Namespace) -> str | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        RunDirectoryError: There is one without `--resume`, or of a run with other arguments.
    """
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint: str | None = get_last_checkpoint(args.out) if args.out.is_dir() else None
    if checkpoint is None:
        return None
    if not args.resume:
        raise RunDirectoryError(f"--out {args.out} holds checkpoints of an earlier run: take another, or --resume to go on")
    if not (args.out / ARGUMENTS).is_file():
        raise RunDirectoryError(f"--out {args.out} holds checkpoints and no {ARGUMENTS}, so what they are of: take another")
    check_same(args, FREE)
    return checkpoint


def check_same(args: argparse.Namespace, free: Sequence[str]) -> None:
    """Whether a run that goes on was begun with these arguments.

    Args:
        args: With `out`.
        free: Arguments that may differ.

    Raises:
        RunDirectoryError: It was not; the message names each difference.
    """
    known, wanted = json.loads((args.out / ARGUMENTS).read_text("utf-8")), json.loads(json.dumps(arguments(args)))
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


def spent(checkpoint: str | None) -> float:
    """Seconds of a run up to its checkpoint, over all its pieces."""
    if checkpoint is None:
        return 0.0
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text("utf-8"))
    return float(max(entry.get("eval_seconds", 0.0) for entry in state["log_history"]))
