"""What a run cost, by role: replies, tokens, time and money, in `ledger.json` of the run directory.

Transcripts hold what belongs to an episode; what a call took, and what an engine's caches saved, depends on everything
else that ran, and stands here.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from usp_env.errors import RunDirectoryError
from usp_env.records import Reply
from usp_env.users.base import Partner

FILE = "ledger.json"
_TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens", "extra_prompt_tokens", "extra_completion_tokens")
_LATENCIES = 10_000  # calls that the quantiles are taken over


@dataclass
class Account:
    """One role's totals.

    Args:
        calls: Batched calls of the speaker.
        replies: Replies asked for.
        failures: Replies that failed.
        seconds: Sum over calls of the time they took.
        tokens: By kind: `prompt_tokens` (of which `cached_tokens` were not read again), `completion_tokens`, and `extra_…`: what
            refused drafts and judges used.
        usd: Cost, where the spec tells prices (`price_in`, `price_out`: dollars a million tokens); None where it does not.
    """

    calls: int = 0
    replies: int = 0
    failures: int = 0
    seconds: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    usd: float | None = None
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))

    def note(self, seconds: float, replies: Sequence[Reply], prices: tuple[float, float] | None) -> None:
        """Add one call."""
        self.calls += 1
        self.replies += len(replies)
        self.failures += sum(reply.error is not None for reply in replies)
        self.seconds += seconds
        self.latencies.append(seconds)
        usages = [reply.generation.usage for reply in replies if reply.generation is not None]
        for kind in _TOKENS:
            if (count := sum(usage.get(kind, 0) for usage in usages)) or kind in self.tokens:
                self.tokens[kind] = self.tokens.get(kind, 0) + count
        if prices is not None:
            paid = [usage for usage in usages if not usage.get("replayed")]
            read, written = (sum(usage.get(kind, 0) + usage.get(f"extra_{kind}", 0) for usage in paid) for kind in _TOKENS[:2])
            self.usd = (self.usd or 0.0) + (read * prices[0] + written * prices[1]) / 1e6

    def to_json(self) -> dict[str, Any]:
        """The file's object for this role; quantiles are of the last 10,000 calls of one process."""
        quantiles = np.quantile(self.latencies, [0.5, 0.95]) if self.latencies else (None, None)
        p50, p95 = (None if q is None else round(float(q), 4) for q in quantiles)
        facts = {"calls": self.calls, "replies": self.replies, "failures": self.failures, **self.tokens}
        return facts | {"seconds": round(self.seconds, 3), "call_p50_s": p50, "call_p95_s": p95, "usd": self.usd}

    def __str__(self) -> str:
        read, kept = self.tokens.get("prompt_tokens", 0), self.tokens.get("cached_tokens", 0)
        cached = f" ({kept / read:.0%} from cache)" if read and kept else ""
        failed = f", {self.failures} failed" if self.failures else ""
        cost = "" if self.usd is None else f", ${self.usd:.4f}"
        written = self.tokens.get("completion_tokens", 0)
        return f"{self.replies} replies{failed}, {read:,} tokens read{cached}, {written:,} written, {self.seconds:.1f} s{cost}"


class Ledger:
    """Accounts of both roles.

    Args:
        folder: Where `ledger.json` is written; totals that are there are gone on with. Of several processes that write into one
            directory, the last one's totals stand there.

    Raises:
        RunDirectoryError: The file is damaged.

    Example:
        >>> import tempfile
        >>> ledger = Ledger(Path(tempfile.mkdtemp()))
        >>> with ledger.timing("user", None) as noted:
        ...     noted.extend([Reply("hi")])
        >>> ledger.accounts["user"].replies
        1
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.accounts: dict[str, Account] = {}
        self._lock = threading.Lock()
        if self.file.is_file():
            self._load()

    @contextmanager
    def timing(self, role: str, speaker: Partner | None) -> Iterator[list[Reply]]:
        """Time a call; the block puts its replies into the list that it gets. A call that raises is not counted."""
        replies: list[Reply] = []
        start = perf_counter()
        yield replies
        seconds = perf_counter() - start
        with self._lock:
            self.accounts.setdefault(role, Account()).note(seconds, replies, getattr(speaker, "prices", None))

    def write(self) -> None:
        """Write the file, whole or not at all."""
        with self._lock:
            text = json.dumps({role: account.to_json() for role, account in sorted(self.accounts.items())}, indent=1)
            fresh = self.file.with_name(f"{FILE}.{os.getpid()}.new")  # other processes may write theirs
            fresh.write_text(text + "\n", "utf-8")
            fresh.replace(self.file)

    def _load(self) -> None:
        try:
            saved: Mapping[str, Any] = json.loads(self.file.read_text("utf-8"))
            for role, facts in saved.items():
                tokens = {kind: int(facts[kind]) for kind in _TOKENS if kind in facts}
                calls, replies, failures = (int(facts[name]) for name in ("calls", "replies", "failures"))
                usd = None if facts["usd"] is None else float(facts["usd"])
                self.accounts[role] = Account(calls, replies, failures, float(facts["seconds"]), tokens, usd)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RunDirectoryError(f"{self.file}: expected a ledger, it is damaged ({error!r}): remove it") from error
