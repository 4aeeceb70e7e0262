"""Run directories: `run.json` (what was run) and `transcripts.jsonl` (one finished episode a line).

A line is written in one piece under a lock, so that a killed process loses no line already written and several
processes may share a directory; a line cut off by a crash is taken out when the run is resumed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usp_env.dialogue import Dialogue
from usp_env.episode import Episode
from usp_env.errors import RunDirectoryError, TranscriptError
from usp_env.files import decode, locked, write_whole
from usp_env.ledger import FILE as LEDGER
from usp_env.ledger import Ledger

if TYPE_CHECKING:
    from usp_env.driver import Conductor

FILE, RUN = "transcripts.jsonl", "run.json"


@dataclass(frozen=True, slots=True)
class Transcript:
    """One finished episode, as `transcripts.jsonl` holds it.

    Args:
        episode_id: Unique under the seed.
        episode_seed: Seeds every generation.
        agent_role: The agent's seat.
        profile_id: Whose profile.
        population: Drawn from.
        profile: `{"objective", "subjective"}`.
        messages: `{"role", "content", "raw", "finish_reason", "usage"}` and, where known, `token_ids`, `logprobs`.
        rewards: One per step.
        reward_terms: Name to value, at the end.
        utterance_rewards: One per agent utterance.
        terminated: See `usp_env.episode`, as for the next four.
        truncated: Cut off.
        end_reason: Why it ended.
        outcome: How it counts.
        valid: Whether a trainer may learn from it.
        models: Specs of `user` and `assistant`; the agent's is `"agent"` unless it said.
        usage: Token counts by role.
        versions: Of the packages.
        branch: Set by `fork`.
        opening: The user's first utterance, where it was given.
        rules: `usp_env.records.Rules`.
        rejected: An action or reply that was not taken into the dialogue.
        error: What failed, in an `infra_failure`.
        user_options: What the sampler gave to the simulated user.
    """

    episode_id: str
    episode_seed: int
    agent_role: str
    profile_id: str
    population: str
    profile: Mapping[str, str]
    messages: Sequence[Mapping[str, Any]]
    rewards: Sequence[float]
    reward_terms: Mapping[str, float]
    utterance_rewards: Sequence[float]
    terminated: bool
    truncated: bool
    end_reason: str
    outcome: str
    valid: bool
    models: Mapping[str, str]
    usage: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]
    branch: str = ""
    opening: str | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)
    rejected: str | None = None
    error: str | None = None
    user_options: Mapping[str, Any] = field(default_factory=dict)

    def dialogue(self) -> Dialogue:
        """The conversation, for rewards and metrics."""
        return Dialogue.of({"role": m["role"], "content": m["content"]} for m in self.messages)

    def to_json(self) -> dict[str, Any]:
        """The line's object."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_TYPES: dict[str, type | tuple[type, ...]] = {
    "episode_id": str,
    "episode_seed": int,
    "agent_role": str,
    "profile_id": str,
    "population": str,
    "profile": dict,
    "messages": list,
    "rewards": list,
    "reward_terms": dict,
    "utterance_rewards": list,
    "terminated": bool,
    "truncated": bool,
    "end_reason": str,
    "outcome": str,
    "valid": bool,
    "models": dict,
    "usage": dict,
    "versions": dict,
}


def transcribe(episode: Episode, models: Mapping[str, str]) -> Transcript:
    """The transcript of a finished episode."""
    spec = episode.spec
    return Transcript(
        episode_id=episode.id,
        episode_seed=spec.episode_seed,
        agent_role=episode.rules.agent_role,
        profile_id=spec.profile_id,
        population=spec.population,
        profile={"objective": episode.profile.objective, "subjective": episode.profile.subjective},
        messages=[_message(message) for message in map(asdict, episode.messages)],
        rewards=list(episode.rewards),
        reward_terms=dict(episode.reward_terms),
        utterance_rewards=list(episode.utterance_rewards),
        terminated=episode.terminated,
        truncated=episode.truncated,
        end_reason=episode.end_reason or "",
        outcome=episode.outcome or "",
        valid=episode.valid,
        models=dict(models),
        usage=episode.usage(),
        versions=versions(),
        branch=episode.branch,
        opening=spec.opening,
        rules=asdict(episode.rules),
        rejected=episode.rejected,
        error=episode.error,
        user_options=dict(episode.user_options),
    )


def _message(record: dict[str, Any]) -> dict[str, Any]:
    # Token ids and log-probabilities only where an engine told them: most readers want the text.
    kept = {key: value for key, value in record.items() if value or key not in ("token_ids", "logprobs", "notes")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}  # as JSON gives it back


def read_transcripts(path: str | Path, torn: str = "raise") -> list[Transcript]:
    """Read a transcripts file, or the one in a run directory.

    An `infra_failure` that a later line of the same episode made good (`--resume` runs it again) is left out.

    Args:
        path: File or directory.
        torn: What to do about a last line that a crash cut off: `"raise"` or `"skip"`.

    Raises:
        TranscriptError: There is none, or a line breaks the format (file, line and field are named).
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise TranscriptError(f"expected a run directory or a transcripts file, found neither at {str(path)!r}")
    # A crash may cut a line off within a character, so bytes are split and whole lines decoded.
    whole, newline, rest = file.read_bytes().rpartition(b"\n")
    lines = decode(whole, file, TranscriptError).split("\n") if newline else []
    if rest and torn == "raise":
        raise TranscriptError(
            f"{file}, line {len(lines) + 1}: cut off ({rest[:60].decode('utf-8', 'replace')!r} …); the run was interrupted: "
            "resume it with --resume, or delete that line"
        )
    read = [parse_transcript(line, file, number) for number, line in enumerate(lines, 1) if line.strip()]
    last = {_identity(transcript): number for number, transcript in enumerate(read)}
    good = {_identity(transcript) for transcript in read if transcript.outcome != "infra_failure"}
    failed = {number for key, number in last.items() if key not in good}
    return [t for number, t in enumerate(read) if t.outcome != "infra_failure" or number in failed]


def _identity(transcript: Transcript) -> tuple[object, ...]:
    return transcript.episode_id, transcript.branch


def parse_transcript(line: str, file: str | Path, number: int) -> Transcript:
    """Read one line.

    Raises:
        TranscriptError: It breaks the format.
    """
    where = f"{file}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TranscriptError(f"{where}: expected one JSON object, got {line[:80]!r} ({error})") from error
    if not isinstance(record, dict):
        raise TranscriptError(f"{where}: expected a JSON object, got {line[:80]!r}")
    for name, kind in _TYPES.items():
        if name not in record:
            raise TranscriptError(f"{where}: field {name!r} is missing; was this file written by usp_env?")
        if not isinstance(record[name], kind) or (kind is int and isinstance(record[name], bool)):
            raise TranscriptError(f"{where}, field {name!r}: expected {kind}, got {record[name]!r:.80}")
    numbers = {
        "rewards": record["rewards"],
        "utterance_rewards": record["utterance_rewards"],
        "reward_terms": record["reward_terms"].values(),
    }
    for name, values in numbers.items():
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise TranscriptError(f"{where}, field {name!r}: expected numbers, got {record[name]!r:.80}")
    for index, message in enumerate(record["messages"]):
        good = isinstance(message, dict) and message.get("role") in ("user", "assistant")
        if not good or not isinstance(message.get("content"), str):
            raise TranscriptError(
                f"{where}, field 'messages'[{index}]: expected a role and a content string, got {message!r:.80}"
            )
    known = {f.name for f in fields(Transcript)}
    return Transcript(**{key: value for key, value in record.items() if key in known})


class RunDirectory:
    """Where a run is written.

    Args:
        path: The directory; made if it is not there.
        config: What `run.json` records and a resumed run must share.
        resume: Go on with a run that is there: `finished` holds the ids of its episodes, but for those that infrastructure
            failed: they may be run again.
        overwrite: Begin anew over whatever is there.
        provenance: Also recorded, and a resumed run must share it: digests of models, bank and sampler
            (`Conductor.provenance`).

    Raises:
        RunDirectoryError: The path is taken, or configuration or provenance of the resumed run differ (the diff is shown).
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.finished: set[str] = set()
        self.ledger: Ledger
        self.models: Mapping[str, str] | None = None  # set by who knows both speakers; an environment knows its partner
        self._lock = threading.Lock()
        check_free(path, resume, overwrite)
        resolved = json.loads(json.dumps(config)) if config is not None else None
        origin = json.loads(json.dumps(provenance, default=str)) if provenance is not None else None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"cannot make the run directory {str(path)!r} ({error.strerror}): choose another") from error
        if resume and (self.path / RUN).is_file():
            self._check_same(resolved, origin)
            self._mend()
            with open(self.file, "ab") as stream:  # of several writers one at a time
                locked(stream)
                note_resumed(self.path)
            known = read_transcripts(self.path) if self.file.is_file() else []
            self.finished = {t.episode_id for t in known if t.outcome != "infra_failure"}
            self.ledger = Ledger(self.path)
        else:
            self._begin(overwrite)
            (self.path / LEDGER).unlink(missing_ok=True)
            self.ledger = Ledger(self.path)
            text = json.dumps(describe(resolved) | {"provenance": origin}, indent=1, ensure_ascii=False)
            write_whole(self.path / RUN, text + "\n")

    @property
    def file(self) -> Path:
        """The transcripts."""
        return self.path / FILE

    def write(self, transcript: Transcript) -> None:
        """Append one line, in one piece."""
        line = _encode(transcript.to_json())
        with self._lock, open(self.file, "a+b") as stream:
            locked(stream)
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # another writer was killed in the middle of a line
                    line = b"\n" + line
            stream.write(line + b"\n")

    def write_episode(self, episode: Episode, conductor: Conductor) -> None:
        """Append a finished episode of an environment."""
        partner = conductor.partner
        models = self.models or {partner.role: partner.spec, conductor.rules.agent_role: "agent"}
        self.write(transcribe(episode, models))

    def __deepcopy__(self, memo: dict[int, Any]) -> RunDirectory:
        return self  # forks of an environment write into the same run

    def _begin(self, overwrite: bool) -> None:
        # "x": of two runs that begin at once and find the directory empty, one gets it, and the other empties nothing.
        try:
            open(self.file, "wb" if overwrite else "xb").close()
        except FileExistsError as error:
            raise RunDirectoryError(f"another run has just begun in {str(self.path)!r}: choose another directory") from error

    def _check_same(self, config: Any, provenance: Any) -> None:
        before = _read_run(self.path)
        if config is not None and (changed := list(_changes(before["config"] or {}, config))):
            raise RunDirectoryError(
                f"{str(self.path)!r} holds a run with another configuration ({'; '.join(changed)}): use another directory"
            )
        known = before.get("provenance")
        if None not in (known, provenance) and (changed := list(_changes(known, provenance))):
            raise RunDirectoryError(
                f"{str(self.path)!r} holds a run of the same configuration, but what it names has changed since "
                f"({'; '.join(changed)}): bring that back, or use another directory"
            )

    def _mend(self) -> None:
        """Take out lines that a crash cut off; a writer that is still at work keeps what it appends.

        No other byte moves, so that a crash in here costs nothing: a line is blanked (readers skip blank lines), the tail cut.
        """
        if not self.file.is_file():
            return
        with open(self.file, "r+b") as stream:
            locked(stream)
            *lines, tail = stream.read().split(b"\n")
            start = 0
            for line in lines:
                if _is_torn(line):
                    stream.seek(start)
                    stream.write(b" " * len(line))
                start += len(line) + 1
            if tail:
                stream.truncate(start)


def _is_torn(line: bytes) -> bool:
    """Whether a line is the beginning of an object and not the whole of it, or what is left of one that was being blanked."""
    if not line.startswith((b"{", b" ")) or not line.strip():
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, by path: `models.hf:x.weights: 'a' → 'b'`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old!r} → {new!r}"


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a directory.

    Raises:
        RunDirectoryError: `run.json` is damaged.
    """
    return _read_run(folder)["config"] or {}


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads((folder / RUN).read_text("utf-8"))
        for value in (run["config"], run.get("provenance")):
            if not isinstance(value, dict | None):
                raise ValueError(f"expected an object, got {value!r:.80}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(f"{folder / RUN}: expected what a run writes there, it is damaged ({error!r})") from error
    return run


def check_free(path: str | Path, resume: bool = False, overwrite: bool = False) -> None:
    """Raise `RunDirectoryError` unless a run may be written here as asked; cheap, so it can come before models load."""
    folder = Path(path)
    if folder.is_file():
        raise RunDirectoryError(f"expected a directory to write to, but {str(path)!r} is a file: choose another")
    taken = folder.is_dir() and any(file.name != f"{RUN}.new" for file in folder.iterdir())  # what a kill left of `write_whole`
    if taken and not (resume or overwrite):
        raise RunDirectoryError(
            f"{str(path)!r} is not empty: choose another directory, resume the run (--resume, resume=True), or begin "
            "anew over it (--overwrite, overwrite=True)"
        )
    if taken and resume and not (folder / RUN).is_file():
        raise RunDirectoryError(
            f"{str(path)!r} is not empty, and it holds no run to resume ({RUN} is missing): choose another directory"
        )


def describe(config: Any) -> dict[str, Any]:
    """What `run.json` holds: configuration, command, versions, hardware."""
    return {
        "config": config,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": versions(),
        "hardware": {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()},
    }


def note_resumed(folder: Path) -> None:
    """Add to `resumed` of `run.json` who goes on with the run: command, commit, versions, hardware."""
    run = _read_run(folder)
    now = {key: value for key, value in describe(None).items() if key != "config"}
    again = run | {"resumed": [*run.get("resumed", []), now]}
    write_whole(folder / RUN, json.dumps(again, indent=1, ensure_ascii=False) + "\n")


def _commit() -> str | None:
    """The checkout's commit, where the package runs from one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run gives."""
    found = {}
    for name in ("usp-env", "gymnasium", "numpy", "torch", "transformers", "openai"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _encode(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a rejected action with lone surrogates: escapes keep them
        return json.dumps(record).encode()
