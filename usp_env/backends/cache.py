"""Record generations and answer from the record: the same conversation again, without weights, server or key.

| mode     | a request that the store holds | one that it does not            | needs                     |
|----------|--------------------------------|---------------------------------|---------------------------|
| `record` | answered from the store        | the inner backend, then stored  | an inner backend          |
| `replay` | answered from the store        | the inner backend, never stored | an inner backend, a store |
| `strict` | answered from the store        | `CacheMissError`                | a store                   |

`record` grows a store; `replay` leaves a reference store as it is while new requests still work; `strict` makes no call
at all. The key of a generation is the SHA-256 of everything that decides it: the backend's identity (weights digest,
adapters, renderer version) and the whole request, seed included. A failed generation is never stored.

A store is one SQLite file, so several processes may write it at once and a killed one leaves it whole. It also
remembers the identity of each spec that was recorded, so `strict` needs nothing but the spec.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from usp_env.backends.base import Backend, Generation, Request
from usp_env.errors import CacheMissError, MissingAssetError, SpecError, UnknownNameError

Mode = Literal["record", "replay", "strict"]
FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS generations (key TEXT PRIMARY KEY, request TEXT NOT NULL, generation TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS backends (spec TEXT PRIMARY KEY, identity TEXT NOT NULL) WITHOUT ROWID;
"""
_WAIT_FOR_WRITERS = 60.0  # seconds


class CacheBackend:
    """A store of generations around a backend, or in its place.

    Args:
        inner: The backend; None in `strict` mode, where it would not be called anyway.
        path: The store's file; `record` makes it.
        mode: See the module's table.
        spec: Whose record to replay without an inner backend; not needed where the store holds one backend's only.
        identity: Likewise, for a backend whose spec has been recorded with newer weights since.

    Raises:
        SpecError: A mode without what it needs, `record` of a backend with mutable weights, or a file of another kind.
        MissingAssetError: There is no store to replay.
        UnknownNameError: The store has no record of `spec`.

    Example:
        >>> import tempfile
        >>> from usp_env.backends.scripted import ScriptedBackend
        >>> path = Path(tempfile.mkdtemp()) / "replies.sqlite"
        >>> request = Request([{"role": "user", "content": "hi"}], seed=7)
        >>> CacheBackend(ScriptedBackend(["Hello!"]), path, "record").generate([request])[0].text
        'Hello!'
        >>> CacheBackend(None, path, "strict").generate([request])[0].text
        'Hello!'
    """

    def __init__(
        self,
        inner: Backend | None,
        path: str | Path,
        mode: Mode = "record",
        *,
        spec: str | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise SpecError(f"cache mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
        if inner is None and mode != "strict":
            raise SpecError(f"cache mode {mode!r} calls a backend on a miss: give one, or use mode='strict'")
        self.inner, self.path, self.mode = inner, Path(path), mode
        self._check_weights()
        if mode != "record" and not self.path.is_file():
            raise MissingAssetError(f"expected a store of generations at {self.path}, there is none; mode='record' makes it")
        self._identity = identity
        self.spec = inner.spec if inner is not None else spec or self._only_spec()
        self._prepare()

    @property
    def identity(self) -> Mapping[str, Any]:
        """The inner backend's as it is now, or what the store remembers of it."""
        if self._identity is not None:
            return self._identity
        return self.inner.identity if self.inner is not None else self._remembered

    @cached_property
    def _remembered(self) -> Mapping[str, Any]:
        with self._open() as store:
            row = store.execute("SELECT identity FROM backends WHERE spec = ?", (self.spec,)).fetchone()
        if row is None:
            raise UnknownNameError(f"spec recorded in {self.path}", self.spec, self._specs())
        identity: dict[str, Any] = json.loads(row[0])
        return identity

    @property
    def mutable(self) -> bool:
        """Whether the inner backend's weights can change."""
        return self.inner is not None and self.inner.mutable

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation per request, in order; equal requests are generated once.

        Raises:
            CacheMissError: `strict`, and the store does not hold a request.
            BackendError: From the inner backend.
        """
        keys, found, missing = self._look_up(requests)
        if missing and self.inner is not None:
            found |= self._keep(missing, self.inner.generate(list(missing.values())))
        return _answers(keys, found, missing)

    async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` for event loops."""
        keys, found, missing = await asyncio.to_thread(self._look_up, requests)
        if missing and self.inner is not None:
            made = await self.inner.agenerate(list(missing.values()))
            found |= await asyncio.to_thread(self._keep, missing, made)
        return _answers(keys, found, missing)

    def __len__(self) -> int:
        """Generations in the store, of all backends."""
        with self._open() as store:
            return int(store.execute("SELECT count(*) FROM generations").fetchone()[0])

    def _check_weights(self) -> None:
        """An engine may become mutable after it was wrapped."""
        if self.mode == "record" and self.inner is not None and self.inner.mutable:
            raise SpecError(
                f"{self.inner.spec!r} has weights that change, so its replies cannot be recorded; cache a fixed checkpoint"
            )

    def _look_up(self, requests: Sequence[Request]) -> tuple[list[str], dict[str, Generation], dict[str, Request]]:
        self._check_weights()
        identity = self.identity
        keys = [request_key(identity, request) for request in requests]
        with self._open() as store:
            found = _read(store, keys)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        if missing and self.mode == "strict":
            raise CacheMissError(self._miss(list(missing.values())))
        return keys, found, missing

    def _keep(self, missing: Mapping[str, Request], made: Sequence[Generation]) -> dict[str, Generation]:
        fresh = dict(zip(missing, made, strict=True))
        rows = [(key, _dump(_plain(missing[key])), _dump(_frozen(g))) for key, g in fresh.items() if g.error is None]
        if self.mode != "record" or not rows:
            return fresh
        with self._open() as store:
            with store:
                store.executemany("INSERT OR IGNORE INTO generations VALUES (?, ?, ?)", rows)
            # Where another process was first, its generation is the one that will be replayed.
            return fresh | _read(store, [key for key, _, _ in rows])

    def _prepare(self) -> None:
        """Make or check the file, and remember whose record it is."""
        with self._open() as store:
            store.execute("BEGIN")  # both reads of one moment: another process may be making the store right now
            version = store.execute("PRAGMA user_version").fetchone()[0]
            tables = store.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            store.rollback()
            if version != FORMAT and (tables or version or self.mode != "record"):
                raise SpecError(
                    f"{self.path}: expected a store of generations in format {FORMAT}, got a database of another kind"
                )
            if self.mode == "record":
                store.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
                with store:
                    store.execute("INSERT OR REPLACE INTO backends VALUES (?, ?)", (self.spec, _dump(self.identity)))
        self.identity  # noqa: B018 - an unknown spec should be told now

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one visit: none is shared by threads or carried into a forked process."""
        # Never `ro`: after a crash the next reader has to roll a half-written batch back. A write-protected file still opens.
        access = "rwc" if self.mode == "record" else "rw"
        uri = f"{self.path.resolve().as_uri()}?mode={access}"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_WAIT_FOR_WRITERS)) as store:
                yield store
        except sqlite3.DatabaseError as error:
            raise SpecError(f"{self.path}: cannot be used as a store of generations ({error})") from error

    def _specs(self) -> list[str]:
        with self._open() as store:
            return [spec for (spec,) in store.execute("SELECT spec FROM backends ORDER BY spec")]

    def _only_spec(self) -> str:
        specs = self._specs()
        if len(specs) != 1:
            raise SpecError(f"{self.path} holds the records of {len(specs)} backends: give spec=, one of {', '.join(specs)}")
        return specs[0]

    def _miss(self, missing: Sequence[Request]) -> str:
        first = missing[0]
        said = first.messages[-1]["content"] if first.messages else f"ids {list(first.token_ids or ())[:20]}"
        return (
            f"{self.path} does not hold {len(missing)} of the requests of {self.spec!r}; the first: role {first.role!r}, "
            f"seed {first.seed}, {said[:80]!r}. Record it: the same command with mode='record' and the model at hand"
        )


def _answers(keys: Sequence[str], found: Mapping[str, Generation], missing: Mapping[str, Request]) -> list[Generation]:
    """In order; what was not generated now is marked `replayed`, since nobody pays for it again."""
    unpaid = dict.fromkeys(missing)
    answers = []
    for key in keys:
        made = found[key]
        first = unpaid.pop(key, made) is None
        answers.append(made if first else replace(made, usage={**made.usage, "replayed": 1}))
    return answers


def request_key(identity: Mapping[str, Any], request: Request) -> str:
    """The key of a generation: SHA-256 of the canonical JSON of identity and request."""
    return hashlib.sha256(_dump({"identity": identity, "request": _plain(request)}).encode()).hexdigest()


def _plain(request: Request) -> dict[str, Any]:
    messages = None if request.messages is None else [dict(message) for message in request.messages]
    token_ids = None if request.token_ids is None else [int(i) for i in request.token_ids]
    shape = {} if request.json_schema is None else {"json_schema": request.json_schema}  # older stores keep their keys
    return shape | {
        "messages": messages,
        "token_ids": token_ids,
        "role": request.role,
        "sampling": asdict(request.sampling),
        "seed": request.seed,
        "adapter": request.adapter,
        "can_end": request.can_end,
        "chat_template_kwargs": dict(request.chat_template_kwargs),
    }


def _frozen(generation: Generation) -> dict[str, Any]:
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "logprobs": generation.logprobs,
        "finish_reason": generation.finish_reason,
        "usage": dict(generation.usage),
        "notes": dict(generation.notes),
    }


def _thawed(text: str) -> Generation:
    record = json.loads(text)
    for name in ("token_ids", "logprobs"):
        record[name] = None if record[name] is None else tuple(record[name])
    return Generation(**record)


def _read(store: sqlite3.Connection, keys: Sequence[str]) -> dict[str, Generation]:
    rows = (
        (key, store.execute("SELECT generation FROM generations WHERE key = ?", (key,)).fetchone()) for key in dict.fromkeys(keys)
    )
    return {key: _thawed(row[0]) for key, row in rows if row is not None}


def _dump(value: Any) -> str:
    """Canonical JSON; ASCII, so that any text (lone surrogates too) can be stored and hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
