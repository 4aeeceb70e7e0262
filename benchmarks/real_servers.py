"""Many dialogues against a real server that is killed in the middle, started again, and the run resumed: is anything lost?

    python -m benchmarks.real_servers --server vllm --server-python .venv-vllm/bin/python --episodes 200
    python -m benchmarks.real_servers --server transformers --server-python .venv-vllm/bin/python --episodes 200

The server is vLLM's (`vllm serve`) or `transformers serve`, on this machine's loopback, with the packaged SmolLM2. On vLLM's the
user is USP over `/v1/completions` with token ids; `transformers serve` takes no ids, so that its user is role-play over
`/v1/chat/completions`. The server gets SIGKILL when a third of the episodes are written.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.page import Section, command_line
from usp_env.models import assets
from usp_env.transcripts import read_transcripts

COMMANDS = {
    # Prompts are read whole: on a CPU, vLLM 0.32 dies of a seeded request that it reads in parts.
    "vllm": "-m vllm.entrypoints.openai.api_server --model {model} --served-model-name smollm2-135m --port {port} "
    "--max-model-len 2048 --enforce-eager --kv-cache-memory-bytes 2000000000 --dtype float32 --block-size 32 "
    "--no-enable-chunked-prefill",
    "transformers": "-m transformers.cli.transformers serve {model} --port {port} --device cpu --dtype float32",
}
USERS = {"vllm": "usp:openai:{name}@{url}", "transformers": "roleplay:openai:{name}@{url}"}


@contextmanager
def serving(kind: str, python: str, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers, in a process group of its own."""
    command = [python, *COMMANDS[kind].format(model=assets.path("smollm2-135m"), port=port).split()]
    with log.open("ab") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text('utf-8', 'replace')[-2000:]}")
            time.sleep(1)
        yield server
    finally:
        _kill(server)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _kill(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def play(args: argparse.Namespace, port: int, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """The run, in a process of its own."""
    url = f"http://127.0.0.1:{port}/v1"
    name = "smollm2-135m" if args.server == "vllm" else str(assets.path("smollm2-135m"))
    user = USERS[args.server].format(name=name, url=url) + f"?max_tokens={args.tokens}&timeout={args.timeout}"
    assistant = f"openai:{name}@{url}?max_tokens={args.tokens}&timeout={args.timeout}"
    options = ["--user", user, "--assistant", assistant, "--episodes", str(args.episodes), "--turns", str(args.turns)]
    options += [
        "--lanes",
        str(args.lanes),
        "--seed",
        "0",
        "--population",
        "all",
        "--reward",
        "none",
        "--out",
        str(out),
        "--quiet",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "usp_env.cli", "play", *options, "--out", str(out), *more], stdout=subprocess.DEVNULL
    )


def written(out: Path) -> int:
    """Episodes in the file."""
    return (out / "transcripts.jsonl").read_bytes().count(b"\n") if (out / "transcripts.jsonl").is_file() else 0


def measure(args: argparse.Namespace, folder: Path) -> list[list[object]]:
    """What was there after the kill, and after the resumed run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out, rows = folder / "run", []
    start = time.perf_counter()
    with serving(args.server, args.server_python, port, folder / "server.log") as server:
        player = play(args, port, out)
        while written(out) < args.episodes / 3 and player.poll() is None:
            time.sleep(0.1)
        _kill(server)
        status = player.wait()
    first = read_transcripts(out)
    rows.append(_row("killed", status, first, time.perf_counter() - start))
    start = time.perf_counter()
    with serving(args.server, args.server_python, port, folder / "server.log"):
        status = play(args, port, out, "--resume").wait()
    last = read_transcripts(out)
    rows.append(_row("resumed", status, last, time.perf_counter() - start))
    if len(last) != args.episodes or any(t.outcome == "infra_failure" for t in last):
        raise SystemExit(f"{len(last)} of {args.episodes} episodes after the resumed run: {Counter(t.outcome for t in last)}")
    if not any(t.outcome == "infra_failure" for t in first):
        raise SystemExit("the server was killed too late: nothing failed")
    kept = {t.episode_id: t for t in last}
    good = [t for t in first if t.outcome != "infra_failure"]
    if len(kept) != len(last) or any(kept.get(t.episode_id) != t for t in good):
        raise SystemExit("an episode was lost, changed or written twice")
    return rows


def _row(name: str, status: int, transcripts: list, seconds: float) -> list[object]:  # type: ignore[type-arg]
    outcomes = Counter(t.outcome for t in transcripts)
    wrong = [t for t in transcripts if t.outcome == "infra_failure" and (t.valid or any(t.rewards) or not t.error)]
    if wrong:
        raise SystemExit(f"{len(wrong)} failures are not masked or not told: {wrong[0].episode_id}")
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return [name, status, len(transcripts), told, f"{seconds:.0f}"]


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    text = (
        f"{args.episodes} dialogues of {args.turns} turns, {args.lanes} at a time, against `{args.server}`'s server, which gets "
        "SIGKILL after a third. Every failure is typed (`infra_failure`, with its error), invalid and without reward; what was "
        "finished before is unchanged after `--resume`, and no episode is there twice."
    )
    header = ["", "exit status", "episodes", "outcomes", "seconds"]
    return Section(f"A server that dies: {args.server}", command_line("real_servers", parser(), args), header, rows, text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--server", choices=COMMANDS, default="vllm")
    made.add_argument("--server-python", default=".venv-vllm/bin/python", help="a Python with vLLM (make test-vllm makes one)")
    made.add_argument("--episodes", type=int, default=200)
    made.add_argument("--turns", type=int, default=2)
    made.add_argument("--lanes", type=int, default=32)
    made.add_argument("--tokens", type=int, default=24)
    made.add_argument("--timeout", type=float, default=120.0)
    return made


if __name__ == "__main__":
    section(parser().parse_args()).show()
