"""Record and replay."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from usp_env.backends.base import Backend, Generation, Request, Sampling, failed
from usp_env.backends.cache import CacheBackend, request_key
from usp_env.backends.scripted import ScriptedBackend
from usp_env.errors import BackendError, CacheMissError, MissingAssetError, SpecError, UnknownNameError


def ask(text: str, seed: int = 0, **kwargs: Any) -> Request:
    return Request([{"role": "user", "content": text}], seed=seed, **kwargs)


def echo(request: Request) -> str:
    assert request.messages is not None
    return f"{request.messages[-1]['content']}!{request.seed}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "replies.sqlite"


RICH = Generation(
    "naïve\u2028 \ud800 text",
    (1, 2),
    (-0.1, float("-inf")),
    "end",
    {"prompt_tokens": 3, "completion_tokens": 2},
    None,
    {"n": [1]},
)


def test_what_was_recorded_is_replayed_exactly(path: Path) -> None:
    recorded = CacheBackend(ScriptedBackend([RICH]), path).generate([ask("a")])
    again = ScriptedBackend([])
    assert recorded == [RICH]
    unpaid = replace(RICH, usage={**RICH.usage, "replayed": 1})  # nobody pays twice
    assert CacheBackend(again, path, "record").generate([ask("a")]) == [unpaid]
    assert CacheBackend(again, path, "replay").generate([ask("a")]) == [unpaid]
    assert CacheBackend(again, path, "strict").generate([ask("a")]) == [unpaid]
    assert CacheBackend(None, path, "strict").generate([ask("a"), ask("a")]) == [unpaid, unpaid]
    assert again.batches == []


def test_the_protocol_is_kept(path: Path) -> None:
    cache = CacheBackend(ScriptedBackend(echo, spec="e"), path)
    assert isinstance(cache, Backend)
    assert (cache.spec, cache.mutable, cache.identity) == ("e", False, {"engine": "scripted", "spec": "e"})
    assert [g.text for g in asyncio.run(cache.agenerate([ask("b"), ask("c", 1)]))] == ["b!0", "c!1"]
    assert [g.text for g in asyncio.run(cache.agenerate([ask("c", 1)]))] == ["c!1"]
    assert len(cache) == 2


def test_equal_requests_are_generated_once_and_order_is_kept(path: Path) -> None:
    inner = ScriptedBackend(echo)
    made = CacheBackend(inner, path).generate([ask("b", 2), ask("a", 1), ask("b", 2), ask("c", 3), ask("a", 1)])
    assert [g.text for g in made] == ["b!2", "a!1", "b!2", "c!3", "a!1"]
    assert inner.batches == [3]


CHANGES: dict[str, Mapping[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "hi "}]},
    "role of a message": {"messages": [{"role": "system", "content": "hi"}]},
    "ids": {"messages": None, "token_ids": (1, 2)},
    "role": {"role": "user"},
    "seed": {"seed": 8},
    "adapter": {"adapter": "lora"},
    "can_end": {"can_end": True},
    "template": {"chat_template_kwargs": {"enable_thinking": False}},
    **{
        f"sampling.{name}": {"sampling": replace(Sampling(), **{name: value})}
        for name, value in {"temperature": 0.5, "top_p": 0.5, "max_tokens": 9, "stop": ("x",), "min_tokens": 1}.items()
    },
}


def test_everything_that_decides_a_reply_is_in_its_key() -> None:
    base = ask("hi", 7)
    identities = [
        {"engine": "hf", "weights": "a"},
        {"engine": "hf", "weights": "b"},
        {"engine": "hf", "weights": "a", "renderer": "2"},
    ]
    keys = [request_key(identities[0], replace(base, **change)) for change in CHANGES.values()]
    keys += [request_key(identity, base) for identity in identities]
    assert len(set(keys)) == len(CHANGES) + 3
    same = replace(base, messages=({"content": "hi", "role": "user"},))
    assert request_key({"weights": "a", "engine": "hf"}, same) == request_key(identities[0], base)


def test_the_key_is_stable() -> None:
    # printf '%s' '{"identity":{"engine":"x"},"request":{"adapter":null,"can_end":false,"chat_template_kwargs":{},"messages":
    # [{"content":"hi","role":"user"}],"role":"assistant","sampling":{"max_tokens":256,"min_tokens":0,"stop":[],
    # "temperature":1.0,"top_p":1.0},"seed":7,"token_ids":null}}' | sha256sum     (one line, no blanks)
    assert request_key({"engine": "x"}, ask("hi", 7)) == "cbb06b1b9eb1f4e2ba3a9a56b7b51443562c29455d168b7f699938225cdea393"


def test_of_two_writers_the_first_is_kept_and_both_hear_it(path: Path) -> None:
    def overtaken(request: Request) -> str:
        CacheBackend(ScriptedBackend(["first"]), path).generate([request])
        return "second"

    assert CacheBackend(ScriptedBackend(overtaken), path).generate([ask("a")])[0].text == "first"
    assert CacheBackend(None, path, "strict").generate([ask("a")])[0].text == "first"


def test_replay_answers_but_does_not_store(path: Path) -> None:
    CacheBackend(ScriptedBackend(echo), path).generate([ask("a")])
    before = path.read_bytes()
    inner = ScriptedBackend(echo)
    cache = CacheBackend(inner, path, "replay")
    assert [g.text for g in cache.generate([ask("a"), ask("new")])] == ["a!0", "new!0"]
    assert inner.batches == [1]
    assert path.read_bytes() == before


def test_strict_says_what_is_missing(path: Path) -> None:
    CacheBackend(ScriptedBackend(echo), path).generate([ask("a")])
    inner = ScriptedBackend(echo)
    with pytest.raises(CacheMissError) as caught:
        CacheBackend(inner, path, "strict").generate([ask("a"), ask("z" * 200, 41, role="user"), Request(token_ids=(1, 2))])
    text = str(caught.value)
    for part in ("2 of the requests", "role 'user'", "seed 41", repr("z" * 80), "mode='record'", str(path)):
        assert part in text
    assert "z" * 81 not in text
    assert inner.batches == []


def test_failures_are_never_stored(path: Path) -> None:
    error = BackendError("down")
    made = CacheBackend(ScriptedBackend([error, "fine"]), path).generate([ask("a"), ask("b")])
    assert (made[0].error, made[1].text) == (error, "fine")
    again = ScriptedBackend(["now it works"])
    made = CacheBackend(again, path).generate([ask("a"), ask("b")])
    assert [g.text for g in made] == ["now it works", "fine"]
    assert failed(error).error is error


def test_one_store_serves_several_backends_by_spec(path: Path) -> None:
    for name in ("one", "two"):
        CacheBackend(ScriptedBackend([name], spec=name), path).generate([ask("a")])
    assert CacheBackend(None, path, "strict", spec="two").generate([ask("a")])[0].text == "two"
    with pytest.raises(SpecError, match="2 backends: give spec=, one of one, two"):
        CacheBackend(None, path, "strict")
    with pytest.raises(UnknownNameError, match="did you mean 'two'"):
        CacheBackend(None, path, "strict", spec="twoo")


def test_other_weights_under_one_spec_are_another_backend(path: Path) -> None:
    class Weights(ScriptedBackend):
        version = "old"

        @property
        def identity(self) -> Mapping[str, Any]:
            return {"weights": self.version}

    old = Weights(["old"], spec="m")
    CacheBackend(old, path).generate([ask("a")])
    new = Weights(["new"], spec="m")
    new.version = "new"
    CacheBackend(new, path).generate([ask("a")])
    assert CacheBackend(None, path, "strict", spec="m").generate([ask("a")])[0].text == "new"
    assert CacheBackend(None, path, "strict", spec="m", identity={"weights": "old"}).generate([ask("a")])[0].text == "old"


def test_what_cannot_work_is_refused(path: Path, tmp_path: Path) -> None:
    inner = ScriptedBackend(echo, spec="policy")
    inner.mutable = True
    with pytest.raises(SpecError, match="'policy' has weights that change"):
        CacheBackend(inner, path, "record")
    for mode in ("record", "replay"):
        with pytest.raises(SpecError, match="calls a backend on a miss"):
            CacheBackend(None, path, mode)
    with pytest.raises(SpecError, match="expected one of record, replay, strict"):
        CacheBackend(inner, path, "write")  # type: ignore[arg-type]
    with pytest.raises(MissingAssetError, match="mode='record' makes it"):
        CacheBackend(None, path, "strict")
    text = tmp_path / "notes.txt"
    text.write_text("not a database at all, just text that is long enough to be looked at" * 20, "utf-8")
    with pytest.raises(SpecError, match="cannot be used as a store"):
        CacheBackend(ScriptedBackend(echo), text)
    foreign = tmp_path / "foreign.sqlite"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(SpecError, match="another kind"):
        CacheBackend(ScriptedBackend(echo), foreign)


def test_a_write_protected_store_is_replayed(path: Path) -> None:
    CacheBackend(ScriptedBackend(["kept"]), path).generate([ask("a")])
    path.chmod(0o444)
    assert CacheBackend(None, path, "strict").generate([ask("a")])[0].text == "kept"


def test_a_batch_of_failures_raised_by_the_inner_backend_passes_through(path: Path) -> None:
    def down(request: Request) -> str:
        raise BackendError("all down")

    with pytest.raises(BackendError, match="all down"):
        CacheBackend(ScriptedBackend(down), path).generate([ask("a")])
    assert len(CacheBackend(ScriptedBackend(down), path)) == 0


# ── several processes, and one that is killed ────────────────────────────────────────────────────────

WRITER = """
import sys
from usp_env.backends.base import Request
from usp_env.backends.cache import CacheBackend
from usp_env.backends.scripted import ScriptedBackend
path, name, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
cache = CacheBackend(ScriptedBackend(lambda request: f"{name} {request.seed} " + "x" * 2000), path)
for i in range(first, last):
    made = cache.generate([Request([{"role": "user", "content": "q"}], seed=10 * i + k) for k in range(10)])
    print(*(g.text.split()[0] for g in made), flush=True)
"""


def writer(path: Path, name: str, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(path), name, str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_several_open_a_new_store_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for i in range(20):
            fresh = tmp_path / f"{i}.sqlite"
            stores = list(pool.map(lambda _, fresh=fresh: CacheBackend(ScriptedBackend(["a"]), fresh), range(8)))
            assert [len(store) for store in stores] == [0] * 8


def test_several_processes_write_one_store(path: Path) -> None:
    writers = [writer(path, f"w{i}", 0, 20) for i in range(4)]
    said = [process.communicate(timeout=60) for process in writers]
    assert [(process.returncode, err) for process, (_, err) in zip(writers, said, strict=True)] == [(0, "")] * 4
    store = CacheBackend(None, path, "strict")
    assert len(store) == 200
    kept = [g.text.split()[0] for g in store.generate([ask("q", seed) for seed in range(200)])]
    # Whoever was first: every writer got what the store now holds.
    assert [out.split() for out, _ in said] == [kept] * 4


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_writer_leaves_a_store_that_reads_and_writes(path: Path) -> None:
    confirmed = 0
    for round_ in range(6):
        process = writer(path, "w", 1000 * round_, 1000 * round_ + 1000)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.01 + 0.013 * round_)
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (-signal.SIGKILL, "")
        confirmed += 10 * (1 + len([line for line in out.split("\n") if line]))
        store = CacheBackend(None, path, "strict")  # the first reader after the crash
        assert len(store) >= confirmed
        assert len(store) % 10 == 0  # batches are whole
        seeds = range(10_000 * round_, 10_000 * round_ + 10)
        assert [g.text.split()[:2] for g in store.generate([ask("q", seed) for seed in seeds])] == [["w", str(s)] for s in seeds]
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_half_written_batch_is_rolled_back_by_the_next_reader(path: Path) -> None:
    CacheBackend(ScriptedBackend(["kept"]), path).generate([ask("a")])
    program = (
        "import os, sqlite3, sys\n"
        "store = sqlite3.connect(sys.argv[1])\n"
        "store.execute('PRAGMA cache_size = 1')\n"  # spills pages of the open transaction into the file
        "store.executemany('INSERT INTO generations VALUES (?, ?, ?)', ((f'k{i}', 'r' * 3000, '{}') for i in range(500)))\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 9
    assert path.with_name(path.name + "-journal").is_file()
    store = CacheBackend(None, path, "strict")
    assert store.generate([ask("a")])[0].text == "kept"
    assert len(store) == 1


def test_nothing_in_the_store_is_binary_code(path: Path) -> None:
    CacheBackend(ScriptedBackend([RICH]), path).generate([ask("a")])
    connection = sqlite3.connect(path)
    [(key, request, generation)] = connection.execute("SELECT * FROM generations").fetchall()
    connection.close()
    assert len(key) == 64
    assert json.loads(request)["messages"] == [{"role": "user", "content": "a"}]
    assert json.loads(generation)["token_ids"] == [1, 2]


def test_weights_that_begin_to_change_are_noticed(path: Path) -> None:
    class Trained(ScriptedBackend):
        mutable = False
        weights = "old"

        @property
        def identity(self) -> Mapping[str, Any]:
            return {"weights": self.weights}

    inner = Trained(lambda request: inner.weights)
    cache = CacheBackend(inner, path)
    assert cache.generate([ask("a")])[0].text == "old"
    inner.weights = "new"
    assert cache.generate([ask("a")])[0].text == "new"
    inner.mutable = True
    with pytest.raises(SpecError, match="weights that change"):
        cache.generate([ask("b")])


def test_one_payment_for_equal_requests(path: Path) -> None:
    made = CacheBackend(ScriptedBackend(echo), path).generate([ask("a"), ask("b"), ask("a")])
    assert [g.usage.get("replayed", 0) for g in made] == [0, 0, 1]
