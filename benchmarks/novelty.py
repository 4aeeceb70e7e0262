"""The novelty pool at the paper's scale: 1,000 x 1,000 pairs against a bank of 87,882 (target: 30 s and 1.2 GB on 2 cores).

    python -m benchmarks.novelty

Peak memory is that of a process of its own, with the bank's embeddings; random entries are compared with the definition in
float64. The kernel's compilation is in the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.page import Section, command_line
from usp_env.sampling.novelty import novelty_pool


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    vectors = rng.standard_normal((rows, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def definition(of: np.ndarray, sc: np.ndarray, bank: tuple[np.ndarray, np.ndarray], parents: tuple[int, int]) -> float:
    """One pair's similarity to its nearest profile but the parents."""
    similarity = 0.5 * (np.einsum("kd,d->k", bank[0], of, dtype=np.float64) + np.einsum("kd,d->k", bank[1], sc, dtype=np.float64))
    similarity[list(parents)] = -np.inf
    return float(similarity.max())


def peak_bytes() -> int:
    """Most memory of this process. Linux's `ru_maxrss` would count what the parent held when it started us."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Seconds of each run, peak bytes of this process, and the largest error of random entries."""
    rng = np.random.default_rng(0)
    bank = unit_rows(rng, args.bank, args.dim), unit_rows(rng, args.bank, args.dim)
    i, j = rng.permutation(args.bank)[: args.m], rng.permutation(args.bank)[: args.n]
    ofs, scs = bank[0][i], bank[1][j]
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        pool = novelty_pool(ofs, scs, *bank, i, j, size=args.size, device=args.device)
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes()
    checked = rng.choice(args.size, min(200, args.size), replace=False)
    exact = [definition(ofs[p], scs[q], bank, (i[p], j[q])) for p, q in pool.pairs[checked]]
    return {"seconds": seconds, "peak": peak, "error": float(np.abs(pool.similarity[checked] - exact).max())}


def section(args: argparse.Namespace) -> Section:
    """The page's section; it measures in a process of its own."""
    numbers = ("m", "n", "bank", "dim", "size", "repeats")
    options = [f"--{name}={getattr(args, name)}" for name in numbers]
    command = [sys.executable, "-m", "benchmarks.novelty", "--json", f"--device={args.device}", *options]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [[k + 1, f"{seconds:.1f}"] for k, seconds in enumerate(result["seconds"])]
    text = (
        f"{args.m:,} x {args.n:,} pairs against {args.bank:,} people ({args.dim} dimensions), the {args.size:,} least similar "
        f"chosen. Peak memory {result['peak'] / 1e9:.2f} GB, the embeddings included. Largest error of 200 random entries "
        f"against the definition in float64: {result['error']:.0e}. {os.cpu_count()} cores."
    )
    return Section("The novelty pool", command_line("novelty", parser(), args), ["run", "seconds"], rows, text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--m", type=int, default=1000, help="OFs")
    made.add_argument("--n", type=int, default=1000, help="SCs")
    made.add_argument("--bank", type=int, default=87_882, help="profiles")
    made.add_argument("--dim", type=int, default=384, help="of an embedding")
    made.add_argument("--size", type=int, default=5000, help="pairs chosen")
    made.add_argument("--device", default="auto")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--json", action="store_true", help="measure in this process and print the numbers")
    return made


if __name__ == "__main__":
    arguments = parser().parse_args()
    if arguments.json:
        print(json.dumps(measure(arguments)))
    else:
        section(arguments).show()
