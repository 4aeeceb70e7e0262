"""All benchmarks on one page (`make bench`).

    python -m benchmarks [--only NAME …] [--out docs/performance.md]

Run it on a machine that does nothing else. What needs a package of its own (another environment to compare with) says so in
its section and is left out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.page import machine, write

NAMES = ("env_overhead", "rollout_throughput", "multi_turn", "novelty", "side_by_side")
OPTIONS = {"multi_turn": ["--picture", "docs/multi_turn.png"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    args = parser.parse_args()
    head, sections = machine(), []
    for name in args.only:
        module = importlib.import_module(f"benchmarks.{name}")
        sys.stdout.write(f"{name} …\n")
        section = module.section(module.parser().parse_args(OPTIONS.get(name, [])))
        section.show()
        sections.append(section)
    write(args.out, sections, head)


if __name__ == "__main__":
    main()
