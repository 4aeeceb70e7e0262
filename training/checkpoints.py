"""Checkpoints of a trainer: whole or not there, without pickle, two of them kept.

    checkpoints = Checkpoints(Path("runs/rlcc/checkpoints"))
    checkpoints.save(12, {"weights": {...}, "optimizer": {...}}, {"step": 12, "config": {...}})
    found = checkpoints.latest()          # None, or the newest that is complete

    checkpoints/step-000012/   weights.safetensors, optimizer.safetensors, state.json (digests of the others)

A checkpoint is written beside its place, flushed to the disk and renamed into it: a process that is killed at any moment, or a
disk that is full, leaves the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from usp_env.errors import TrainingError

STATE = "state.json"
KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was saved.

    Args:
        path: Its folder.
        state: JSON values.
    """

    path: Path
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """One of its files.

        Raises:
            TrainingError: The file is not the one that was saved.
        """
        file = self.path / f"{name}.safetensors"
        if not file.is_file() or _digest(file) != self.state["digests"].get(name):
            raise TrainingError(f"{file}: expected the file that {STATE} names, got another or none: delete {self.path} to go on")
        return load_file(file)


class Checkpoints:
    """A folder of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> Path:
        """Keep what a run goes on from.

        Args:
            step: Updates that are done.
            tensors: File to name to tensor.
            state: JSON values.

        Raises:
            TrainingError: It cannot be written; the checkpoint before is as it was.
        """
        place = self.folder / f"step-{step:06d}"
        with whole(place) as fresh:
            for name, named in tensors.items():
                save_file({key: value.detach().cpu().contiguous() for key, value in named.items()}, fresh / f"{name}.safetensors")
            digests = {name: _digest(fresh / f"{name}.safetensors") for name in tensors}
            (fresh / STATE).write_text(json.dumps({**state, "digests": digests}, indent=1) + "\n", "utf-8")
        for old in (*self._found()[:-KEPT], *self.folder.glob(".step-*.new")):
            shutil.rmtree(old, ignore_errors=True)
        return place

    def latest(self) -> Checkpoint | None:
        """The newest, or None.

        Raises:
            TrainingError: Its state cannot be read.
        """
        for path in reversed(self._found()):
            try:
                return Checkpoint(path, json.loads((path / STATE).read_text("utf-8")))
            except (OSError, ValueError) as error:
                raise TrainingError(
                    f"{path}: expected a checkpoint, got {error}: delete it to go on from the one before"
                ) from error
        return None

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


@contextlib.contextmanager
def whole(place: Path) -> Iterator[Path]:
    """A folder to write into, which is then flushed to the disk and takes its place; `place` is never half written.

    Raises:
        TrainingError: It cannot be written; what was there before is as it was.
    """
    fresh = place.with_name(f".{place.name}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        shutil.rmtree(place, ignore_errors=True)
        fresh.rename(place)
        _flush(place.parent)
    except Exception as error:  # safetensors has an error of its own for a full disk
        shutil.rmtree(fresh, ignore_errors=True)
        raise TrainingError(f"{place} cannot be written ({error}); mend that, then --resume") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """An optimiser's state as named tensors; `names` are its parameters' in their order."""
    found = optimizer.state_dict()["state"]
    return {f"{names[i]}|{key}": torch.as_tensor(value) for i, own in found.items() for key, value in own.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("|")
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
