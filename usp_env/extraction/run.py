"""From a stream of conversations to a bank file: batches, splits, private data, resuming.

| file                  | holds                                                                              |
|-----------------------|------------------------------------------------------------------------------------|
| `<out>`               | the bank, one profile a line, with its conversation                                |
| `<out>.dropped.jsonl` | `{"id", "reason"}` of conversations that gave none; they are not tried again unasked |
| `<out>.run.json`      | the configuration; a resumed run must have the same                                |

Memory holds one batch of conversations, and the ids that are done and that were met (about 100 bytes each).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, get_args

from usp_env.data.conversations import Conversation, group_id
from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError
from usp_env.extraction import pii as private
from usp_env.extraction.extractor import Outcome
from usp_env.extraction.pii import Pii
from usp_env.extraction.store import BankFiles, opened
from usp_env.profiles import SPLITS, reserved_ids


class Source(Protocol):
    """Reads profiles out of conversations: `extractor.Extractor`, or `distilled.Distilled`."""

    def config(self) -> dict[str, Any]:
        """What decides the profiles, for a run's record."""
        ...

    def extract(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        """One outcome per conversation, in order."""
        ...


BATCH = 32
SHARES = (0.9, 0.05, 0.05)


@dataclass
class Tally:
    """What became of the conversations of a run: `seen` = all the others but `retried` and `foreign` together.

    Args:
        seen: Conversations read.
        done: Were finished before.
        repeated: Have the id of an earlier one; left out, whatever they say.
        reserved: Kept for an independent check; left out.
        kept: Profiles written.
        failed: Calls failed; not recorded, so that a resumed run does them.
        dropped: By reason.
        retried: Calls made again.
        foreign: Attributes removed because their evidence quotes the assistant.
    """

    seen: int = 0
    done: int = 0
    repeated: int = 0
    reserved: int = 0
    kept: int = 0
    failed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    foreign: int = 0

    def __str__(self) -> str:
        parts = [f"{self.seen} conversations: {self.kept} kept", f"{self.dropped.total()} dropped", f"{self.failed} failed"]
        parts += [f"{self.done} done before"] * bool(self.done) + [f"{self.reserved} reserved"] * bool(self.reserved)
        parts += [f"{self.repeated} left out since an earlier one has their id"] * bool(self.repeated)
        return ", ".join(parts) + f"; {self.retried} calls retried"


def split_of(key: str, shares: Sequence[float] = SHARES) -> str:
    """The split of a person: a hash, so that it depends on nobody else and all conversations of one person share it.

    The key is `user_id`, or without one what the segments of a conversation share (`group_id`).

    Example:
        >>> split_of("user-1", (1, 0, 0)), split_of("user-1", (0, 0, 1))
        ('train', 'test')
    """
    draw = (
        int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8, key=b"usp_env/split").digest(), "big")
        / 2**64
    )
    if draw < shares[0]:
        return SPLITS[0]
    return SPLITS[1] if draw < shares[0] + shares[1] else SPLITS[2]


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """The shares of train, val and test.

    Raises:
        SpecError: Not three numbers of at least 0 that add up to 1.
    """
    if len(shares) != 3 or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise SpecError(f"splits: expected three shares that add up to 1, such as 0.9,0.05,0.05, got {list(shares)}")
    return tuple(shares)


def parse_shares(text: str) -> tuple[float, ...]:
    """The shares in a text such as `0.9,0.05,0.05`.

    Raises:
        SpecError: Something else.
    """
    try:
        return check_shares([float(part) for part in text.split(",")])
    except ValueError as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"splits: expected three numbers such as 0.9,0.05,0.05, got {text!r}") from error


def extract_bank(
    conversations: Iterable[Conversation],
    out: str | Path,
    extractor: Source,
    *,
    splits: Sequence[float] = SHARES,
    pii: Pii = "mask",
    text: bool = True,
    batch: int = BATCH,
    limit: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    retry_dropped: bool = False,
    config: Mapping[str, Any] | None = None,
    report: Callable[[Tally], None] | None = None,
) -> Tally:
    """Infer a profile of every conversation and write the bank.

    Args:
        conversations: Read once, a batch at a time.
        out: The bank's file.
        extractor: Makes the calls.
        splits: Shares of train, val and test, by person.
        pii: Conversations with private data: `"drop"`, `"mask"` (before any call) or `"keep"`.
        text: Whether the bank holds the conversations beside the profiles.
        batch: Conversations whose calls are made together; a crash costs at most these.
        limit: Look at the first so many conversations only.
        resume: Go on with the bank that is there.
        overwrite: Begin anew over it.
        retry_dropped: With `resume`: try again what was dropped.
        config: More to record (and to compare on resuming), e.g. the source.
        report: Told after every batch.

    Raises:
        RunDirectoryError: `out` exists and neither `resume` nor `overwrite` is set, or its run had another configuration.
        BackendError: Every call of a batch failed; what is done stays written.
    """
    if pii not in get_args(Pii):
        raise SpecError(f"pii: expected one of {', '.join(get_args(Pii))}, got {pii!r}")
    if batch < 1:
        raise SpecError(f"batch: expected at least 1, got {batch}")
    if retry_dropped and not resume:
        raise SpecError("retry_dropped goes on with a bank that is there: set resume too")
    shares = check_shares(splits)
    settings = {**extractor.config(), "splits": list(shares), "pii": pii, "text": text, **(config or {})}
    tally = Tally()
    with opened(Path(out), settings, resume, overwrite, retry_dropped) as files:
        todo = _todo(islice(conversations, limit), files.done, tally)
        while chunk := list(islice(todo, batch)):
            _do(chunk, files, extractor, shares, pii, text, tally)
            if report is not None:
                report(tally)
    return tally


def _todo(conversations: Iterable[Conversation], done: set[str], tally: Tally) -> Iterator[Conversation]:
    met: set[str] = set()
    for conversation in conversations:
        tally.seen += 1
        if conversation.id in reserved_ids():
            tally.reserved += 1
        elif conversation.id in met:
            tally.repeated += 1
        elif conversation.id in done:
            met.add(conversation.id)
            tally.done += 1
        else:
            met.add(conversation.id)
            yield conversation


def _do(
    chunk: Sequence[Conversation],
    files: BankFiles,
    extractor: Source,
    shares: Sequence[float],
    pii: Pii,
    text: bool,
    tally: Tally,
) -> None:
    """Extract one batch and write what came of it."""
    unfit = {c.id: reason for c in chunk if (reason := _unfit(c.dialogue, pii))}
    fit = [_masked(c) if pii == "mask" else c for c in chunk if c.id not in unfit]
    outcomes = {outcome.id: outcome for outcome in extractor.extract(fit)} if fit else {}
    outcomes |= {id: Outcome(id, reason=reason) for id, reason in unfit.items()}
    by_id = {c.id: c for c in fit}
    for c in chunk:
        outcome = outcomes[c.id]
        tally.retried += outcome.retried
        tally.foreign += outcome.foreign
        if outcome.kept:
            record = _record(by_id[c.id], outcome, shares)
            files.keep(record | ({"conversation": [message.chat() for message in by_id[c.id].dialogue]} if text else {}))
            tally.kept += 1
        elif outcome.failed:
            tally.failed += 1
        else:
            files.drop(c.id, outcome.reason)
            tally.dropped[outcome.reason.split(" (")[0]] += 1  # the file has the details
    files.sync()
    if fit and all(outcomes[c.id].failed for c in fit):
        raise BackendError(
            f"every conversation of a batch of {len(fit)} failed, the first with: {outcomes[fit[0].id].reason} (what is done "
            "is written and --resume goes on; a server that refuses response_format needs --plain, structured=False)"
        )


def _unfit(dialogue: Dialogue, pii: Pii) -> str:
    """Why a conversation is dropped before any call, else an empty text."""
    if not any(text.strip() for text in dialogue.utterances("user")):
        return "no user turn"
    if any("\ud800" <= char <= "\udfff" for message in dialogue for char in message.content):
        return "a turn holds a lone surrogate, which is no Unicode"
    found = private.kinds(dialogue) if pii == "drop" else []
    return f"private data: {', '.join(found)}" if found else ""


def _masked(c: Conversation) -> Conversation:
    return Conversation(c.id, private.mask_dialogue(c.dialogue), user_id=c.user_id)


def _record(c: Conversation, outcome: Outcome, shares: Sequence[float]) -> dict[str, Any]:
    person = {} if c.user_id is None else {"user_id": c.user_id}
    silver = {"silver": outcome.silver} if outcome.silver else {}
    return {
        "id": c.id,
        "split": split_of(c.user_id or group_id(c.id), shares),
        **person,
        **silver,
        **(outcome.attributes.to_json() if outcome.attributes else {}),
        "profile": {"objective": outcome.objective, "subjective": outcome.subjective},
    }
