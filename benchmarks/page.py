"""Sections of `docs/performance.md`, and the page itself."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from usp_env.transcripts import versions


@dataclass(frozen=True)
class Section:
    """One benchmark's result.

    Args:
        title: Of the section.
        command: Measures it again.
        header: Of the table.
        rows: Its cells.
        text: What the table shows.
        picture: A PNG file beside it, or None.
    """

    title: str
    command: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    text: str
    picture: str | None = None

    def markdown(self, folder: Path = Path()) -> str:
        """The section; pictures are linked relative to `folder`."""
        lines = [f"## {self.title}", "", f"`{self.command}`", "", self.text, ""]
        lines += [f"| {' | '.join(self.header)} |", f"|{'---|' * len(self.header)}"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in self.rows]
        if self.picture:
            lines += ["", f"![{self.title}]({Path(os.path.relpath(self.picture, folder)).as_posix()})"]
        return "\n".join(lines) + "\n"

    def show(self) -> None:
        """To the terminal."""
        print(self.markdown(), flush=True)


def command_line(name: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """What measures again as `args` say: the benchmark with the options that are not its defaults.

    A Python (`--…-python`) lies elsewhere on the next machine: `PATH-TO-PYTHON` stands for it.
    """
    words = ["python", "-m", f"benchmarks.{name}"]
    for dest, value in vars(args).items():
        if value == parser.get_default(dest):
            continue
        if dest.endswith("_python"):
            value = "PATH-TO-PYTHON"
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += ["--" + dest.replace("_", "-"), *map(str, values)]
    return shlex.join(words)


def machine() -> str:
    """What ran it."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"*{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {packages}; load average "
        f"{os.getloadavg()[0]:.1f} at the start; {date.today().isoformat()}.*"
    )


def write(path: Path, sections: Sequence[Section], head: str) -> None:
    """The page: these sections are renewed, the others stay as they were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = dict(_split(path.read_text("utf-8"))) if path.is_file() else {}
    known |= {section.title: f"{section.markdown(path.parent)}\n{head}\n" for section in sections}
    intro = (
        "# Performance\n\nWritten by `make bench`; nothing here is typed by hand. Each section names the machine it was run on.\n"
    )
    path.write_text("\n".join([intro, *known.values()]), "utf-8")
    sys.stdout.write(f"written: {path}\n")


def _split(page: str) -> list[tuple[str, str]]:
    """Title and text of each section."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]
    return [(part.split("\n", 1)[0].removeprefix("## "), part.rstrip("\n") + "\n") for part in parts]


def picture(file: str, lines: Mapping[str, Sequence[float]], x: str, y: str) -> None:
    """Curves over 1, 2, … as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
    axes.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)
