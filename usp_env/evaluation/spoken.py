"""Single turns after real contexts: what is to be said, saying it, and the file that it is kept in."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from usp_env.dialogue import Message, View, strip_think
from usp_env.endings import speaks_as
from usp_env.errors import TranscriptError
from usp_env.evaluation.people import Person
from usp_env.files import decode, locked
from usp_env.ledger import Ledger
from usp_env.records import Reply, generation_seed
from usp_env.spaces import is_unicode
from usp_env.users.base import Partner, replies_of

SAID, ENDED = "said", "ended"
_FIELDS: Mapping[str, type] = {"person": str, "turn": int, "seed": int, "text": str, "ended": bool, "outcome": str}


@dataclass(frozen=True, slots=True)
class Spoken:
    """One generation, a line of `utterances.jsonl`.

    Args:
        person: Whose context.
        turn: Before which real user turn, from 0; as many as there are is the decision after the person's end.
        seed: Of the evaluation.
        text: What was said; empty where nothing was.
        ended: Whether the user ended the conversation.
        outcome: `said`, `ended` (and nothing said), `context_limit`, `user_failure` or `infra_failure`.
        error: What failed, in an `infra_failure`.
    """

    person: str
    turn: int
    seed: int
    text: str
    ended: bool
    outcome: str
    error: str | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """Which job it answers."""
        return self.person, self.turn, self.seed


@dataclass(frozen=True, slots=True)
class Job:
    """One generation to make."""

    person: Person
    turn: int
    seed: int

    @property
    def key(self) -> tuple[str, int, int]:
        """As `Spoken.key`."""
        return self.person.id, self.turn, self.seed


def episode_seed(person: Person, seed: int) -> int:
    """Seed of a person's generations, the same for every user: 53 bits, which any JSON reader keeps."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{person.id}".encode(), digest_size=8, key=b"evaluate").digest(), "big") >> 11


def jobs(people: Sequence[Person], seeds: Sequence[int], most: int | None = None) -> list[Job]:
    """What to generate: each person's turns that say something, the first `most` of them, and the end where it is known.

    Example:
        >>> from usp_env.dialogue import Dialogue
        >>> from usp_env.evaluation.people import person
        >>> from usp_env.profiles import Profile
        >>> said = [("user", "hi"), ("assistant", "Hello!"), ("user", "bye"), ("assistant", "Bye!")]
        >>> talk = Dialogue.of({"role": role, "content": text} for role, text in said)
        >>> [job.turn for job in jobs([person(Profile("a", "You cook.", "Terse."), talk)], [0])]
        [0, 1, 2]
    """
    found = []
    for seed in seeds:
        for who in people:
            turns = [k for k, text in enumerate(who.turns) if text.strip()][:most]
            whole = most is None or len(who.turns) <= most
            found += [Job(who, turn, seed) for turn in (*turns, *([len(who.turns)] if who.ended and whole else []))]
    return found


def context(person: Person, turn: int) -> tuple[Message, ...]:
    """The real conversation before the user's turn of this number."""
    before = [k for k, message in enumerate(person.dialogue) if message.role == "user"]
    return person.dialogue.messages[: before[turn]] if turn < len(before) else person.dialogue.messages


# ── generating ───────────────────────────────────────────────────────────────────────────────────


def generate(
    user: Partner,
    given: bool,
    todo: Sequence[Job],
    file: Path,
    *,
    lanes: int = 16,
    ledger: Ledger | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> None:
    """Make the generations that the file lacks, `lanes` at a time, and append each as a line.

    Args:
        user: The simulated user.
        given: Whether it is given the profile.
        todo: All jobs of the user.
        file: Lines that are there count as done, but for those that infrastructure failed.
        lanes: Most generations at a time.
        ledger: Where time and tokens are noted.
        watch: Called after each batch with how many jobs are done, and how many there are.
    """
    done = {spoken.key for spoken in read(file) if spoken.outcome != "infra_failure"}
    waiting = [job for job in todo if job.key not in done]
    made = len(todo) - len(waiting)
    for batch in rounds(waiting, lanes):
        append(file, _speak(user, given, batch, ledger))
        made += len(batch)
        if ledger is not None:
            ledger.write()
        if watch is not None:
            watch(made, len(todo))


def rounds(todo: Sequence[Job], lanes: int) -> Iterator[list[Job]]:
    """Batches of at most `lanes` jobs, in which each person has one turn, after the one of the round before.

    The next turn's context begins with this one's: an engine that keeps keys and values reads only what is new. Who has most to
    say begins, so that the last rounds are not about one person.

    Example:
        >>> from types import SimpleNamespace
        >>> a, b, c = (SimpleNamespace(id=name) for name in "abc")
        >>> todo = [Job(a, 0, 0), Job(b, 0, 0), Job(b, 1, 0), Job(c, 0, 0), Job(c, 1, 0), Job(c, 2, 0)]
        >>> [[f"{job.person.id}{job.turn}" for job in batch] for batch in rounds(todo, 2)]
        [['c0', 'b0'], ['c1', 'b1'], ['c2', 'a0']]
    """
    own: dict[tuple[str, int], deque[Job]] = {}
    for job in todo:
        own.setdefault((job.person.id, job.seed), deque()).append(job)
    queues = deque(sorted(own.values(), key=len, reverse=True))
    speaking: list[deque[Job]] = []
    while queues or speaking:
        while queues and len(speaking) < lanes:
            speaking.append(queues.popleft())
        yield [queue.popleft() for queue in speaking]
        speaking = [queue for queue in speaking if queue]


def _speak(user: Partner, given: bool, batch: Sequence[Job], ledger: Ledger | None) -> list[Spoken]:
    """One generation for each job; what gave nothing usable is drawn once more, as in an episode."""
    found: dict[tuple[str, int, int], Spoken] = {}
    open_jobs = list(batch)
    for attempt in (0, 1):
        if not open_jobs:
            break
        replies = _ask(user, given, open_jobs, attempt, ledger)
        for job, reply in zip(open_jobs, replies, strict=True):
            found[job.key] = _taken(job, reply)
        open_jobs = [job for job in open_jobs if found[job.key].outcome == "user_failure"]
    return [found[job.key] for job in batch]


def _ask(user: Partner, given: bool, batch: Sequence[Job], attempt: int, ledger: Ledger | None) -> list[Reply]:
    views = [View("user", context(job.person, job.turn), job.person.profile if given else None) for job in batch]
    seeds = [generation_seed(episode_seed(job.person, job.seed), "", job.turn, "user", attempt) for job in batch]
    timing: AbstractContextManager[list[Reply]] = nullcontext([]) if ledger is None else ledger.timing("user", user)
    with timing as noted:
        noted += replies_of(user, views, seeds)
    return noted


def _taken(job: Job, reply: Reply) -> Spoken:
    """What a reply amounts to; as in an episode, only that a conversation goes on with the real turns."""
    text = strip_think(reply.text).strip()
    opening = not context(job.person, job.turn)
    ended = reply.ended and not opening
    if reply.error is not None:
        return Spoken(*job.key, "", False, "infra_failure", str(reply.error))
    if reply.generation is not None and reply.generation.finish_reason == "context_limit":
        return Spoken(*job.key, "", False, "context_limit")
    if ended and not text:
        return Spoken(*job.key, "", True, ENDED)
    if not text or not is_unicode(reply.text) or speaks_as(text, "assistant"):
        return Spoken(*job.key, "", False, "user_failure")
    return Spoken(*job.key, text, ended, SAID)


def append(file: Path, spoken: Sequence[Spoken]) -> None:
    """Append lines in one piece under a lock; a line that a killed writer left open is closed first."""
    data = b"".join(json.dumps(asdict(one), ensure_ascii=False).encode() + b"\n" for one in spoken)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as stream:
        locked(stream)
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                data = b"\n" + data
        stream.write(data)


def read(file: Path) -> list[Spoken]:
    """The generations in a file, the last good one of each job; what a crash cut off is left out.

    Raises:
        TranscriptError: A whole line breaks the format.
    """
    if not file.is_file():
        return []
    kept: dict[tuple[str, int, int], Spoken] = {}
    for spoken in _lines(file):
        if spoken.key not in kept or spoken.outcome != "infra_failure":
            kept[spoken.key] = spoken
    return list(kept.values())


def _lines(file: Path) -> Iterator[Spoken]:
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            record = json.loads(decode(line, file, TranscriptError)) if line.strip() else None
        except ValueError:  # UTF-8 or JSON that a crash cut off; a line is written in one piece
            record = None
        if record is None:
            continue
        for name, kind in _FIELDS.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise TranscriptError(f"{file}, line {number}, field {name!r}: expected {kind.__name__}, got {record!r:.80}")
        yield Spoken(**{name: record.get(name) for name in (*_FIELDS, "error")})  # type: ignore[arg-type]
