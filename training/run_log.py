"""What a run of `training.rlcc` leaves to be read: metrics, dialogues, and a line for each update on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from usp_env.episode import Episode
from usp_env.files import write_whole
from usp_env.transcripts import transcribe

METRICS = "metrics.jsonl"
COLUMNS = (
    "step",
    "reward",
    "cycle",
    "human",
    "human_twin",
    "kl",
    "entropy",
    "turns",
    "words",
    "copy_rate",
    "clip_fraction",
    "seconds",
)
VALIDATION = ("r_dpc", "r_dpc_twin", "cycle", "human_twin", "copy_rate", "turns")


class RunLog:
    """Writes into a run directory; of several processes the main one writes metrics, and each its dialogues.

    Args:
        out: The run directory.
        accelerator: `accelerate.Accelerator`; its trackers get the metrics too.
    """

    def __init__(self, out: Path, accelerator: Any) -> None:
        self.out, self.accelerator = out, accelerator
        self._lines = 0  # on the terminal

    def note(self, step: int, record: Mapping[str, float]) -> None:
        """One line of `metrics.jsonl`, one on the terminal, and the trackers; of several processes one calls it."""
        with open(self.out / METRICS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
        self.accelerator.log(dict(record), step=step)
        if "val_n" in record:
            told = [f"{name} {record[key]:.3f}" for name in VALIDATION if (key := f"val_{name}") in record]
            print(f"  validation after {step}: {', '.join(told)} (n = {record['val_n']})", flush=True)
        if "reward" in record:
            seconds = sum(value for key, value in record.items() if key.endswith("_seconds"))
            if self._lines % 20 == 0:
                print("  ".join(f"{name:>{max(7, len(name))}}" for name in COLUMNS))
            self._lines += 1
            shown = {**record, "seconds": seconds}
            print("  ".join(f"{shown.get(name, float('nan')):>{max(7, len(name))}.4g}" for name in COLUMNS), flush=True)

    def keep(self, step: int, episodes: Sequence[Episode], models: Mapping[str, str]) -> None:
        """This process's dialogues of an update, one file: an update that is done again after a kill writes it anew."""
        lines = [json.dumps(transcribe(episode, models).to_json(), ensure_ascii=False) for episode in episodes]
        folder = self.out / "dialogues"
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        write_whole(folder / f"step-{step:06d}{rank}.jsonl", "".join(line + "\n" for line in lines))

    def cut(self, step: int) -> None:
        """Drop the lines of updates after a checkpoint, and what a kill cut off: they are written again."""
        file, kept = self.out / METRICS, []
        for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue
        write_whole(file, "".join(line + "\n" for line in kept))


class Clock:
    """Seconds of the parts of an update."""

    def __init__(self) -> None:
        self.last, self.laps = time.monotonic(), dict[str, float]()

    def lap(self, name: str) -> None:
        """The time since the last one goes to this part."""
        now = time.monotonic()
        self.laps[name], self.last = now - self.last, now

    def skip(self) -> None:
        """Leave the time since the last one out: somebody else has measured it."""
        self.last = time.monotonic()


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
