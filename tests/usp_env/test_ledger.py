"""What a run cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from usp_env import assistants, users
from usp_env.backends.base import Generation
from usp_env.backends.scripted import ScriptedBackend
from usp_env.env import make_conductor
from usp_env.errors import BackendError, RunDirectoryError
from usp_env.ledger import Account, Ledger
from usp_env.records import EpisodeSpec, Reply
from usp_env.rollout import roll
from usp_env.transcripts import RunDirectory

USAGE = {"prompt_tokens": 1000, "completion_tokens": 10, "cached_tokens": 600}


def test_an_account_adds_up() -> None:
    account = Account()
    made = Generation("x", usage={**USAGE, "extra_prompt_tokens": 500, "extra_completion_tokens": 5})
    account.note(2.0, [Reply("a", generation=Generation("a", usage=USAGE)), Reply("b", generation=made)], (2.0, 10.0))
    account.note(1.0, [Reply("", error=BackendError("gone"))], None)
    assert account.to_json() == {
        "calls": 2, "replies": 3, "failures": 1, "prompt_tokens": 2000, "completion_tokens": 20, "cached_tokens": 1200,
        "extra_prompt_tokens": 500, "extra_completion_tokens": 5, "seconds": 3.0, "call_p50_s": 1.5, "call_p95_s": 1.95,
        "usd": pytest.approx((2500 * 2 + 25 * 10) / 1e6),
    }  # fmt: skip
    assert str(account) == "3 replies, 1 failed, 2,000 tokens read (60% from cache), 20 written, 3.0 s, $0.0053"
    assert str(Account()) == "0 replies, 0 tokens read, 0 written, 0.0 s"


def test_a_call_that_raises_is_not_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(BackendError), ledger.timing("user", None):
        raise BackendError("gone")
    assert ledger.accounts == {}


def rolled(sampler: object, record: RunDirectory, specs: list[EpisodeSpec]) -> None:
    user = users.load("usp:m?price_in=1", lambda spec: ScriptedBackend(lambda r: Generation(f"{r.seed}", usage=USAGE)))
    conductor = make_conductor(user, sampler, None, population="uniform", max_turns=2)
    conductor.record = record
    roll(conductor, assistants.load("echo"), specs)


def test_a_run_keeps_one_and_a_resumed_run_goes_on(sampler: object, tmp_path: Path) -> None:
    specs = [EpisodeSpec(f"p{i}", "uniform", i) for i in range(6)]
    rolled(sampler, RunDirectory(tmp_path / "run", {}), specs[:4])
    first = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert first["user"]["replies"] == 8
    assert first["user"]["prompt_tokens"] == 8000
    assert first["user"]["usd"] == pytest.approx(0.008)
    assert (first["assistant"]["replies"], first["assistant"]["usd"]) == (8, None)
    rolled(sampler, RunDirectory(tmp_path / "run", {}, resume=True), specs[4:])
    second = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert (second["user"]["replies"], second["user"]["cached_tokens"]) == (12, 7200)
    rolled(sampler, RunDirectory(tmp_path / "run", {}, overwrite=True), specs[:1])
    assert json.loads((tmp_path / "run" / "ledger.json").read_text())["user"]["replies"] == 2
    (tmp_path / "run" / "ledger.json").write_text("[1]")
    with pytest.raises(RunDirectoryError, match="damaged"):
        RunDirectory(tmp_path / "run", {}, resume=True)


def test_many_threads_write_one_ledger(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    ledger = Ledger(tmp_path)

    def note(_: int) -> None:
        with ledger.timing("user", None) as noted:
            noted.append(Reply("hi"))
        ledger.write()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(note, range(400)))
    assert Ledger(tmp_path).accounts["user"].replies == 400
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.json"]


def test_replayed_replies_cost_nothing() -> None:
    account = Account()
    made = [Generation("x", usage=USAGE), Generation("x", usage={**USAGE, "replayed": 1})]
    account.note(1.0, [Reply("x", generation=g) for g in made], (1.0, 0.0))
    assert account.usd == pytest.approx(0.001)


def test_a_speaker_that_fails_is_counted(sampler: object, tmp_path: Path) -> None:
    def gone(request: object) -> str:
        raise BackendError("the server is gone")

    user = users.load("usp:m", lambda spec: ScriptedBackend(gone))
    conductor = make_conductor(user, sampler, None, population="uniform", max_turns=2)
    conductor.record = RunDirectory(tmp_path / "run", {})
    roll(conductor, assistants.load("echo"), [EpisodeSpec("p0", "uniform", 0)])
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert (ledger["user"]["replies"], ledger["user"]["failures"]) == (1, 1)
    assert "assistant" not in ledger


def test_a_duet_of_two_prices_has_none() -> None:
    def price(text: str) -> object:
        return users.load(text, lambda spec: ScriptedBackend(["x"])).prices

    assert price("duet:a?price_in=1+b?price_in=10") is None
    assert price("duet:a?price_in=1+b?price_in=1") == (1.0, 0.0)
