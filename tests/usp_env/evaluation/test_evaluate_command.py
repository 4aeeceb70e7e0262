"""`usp-env evaluate` on a small bank with conversations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from evaluation_doubles import make_people, make_scorers

from usp_env import backends, commands_evaluate
from usp_env.backends.spec import parse
from usp_env.errors import RunDirectoryError, SpecError, UnknownNameError
from usp_env.evaluation import scorers
from usp_env.evaluation.card import NEIGHBOUR, REAL, read_card
from usp_env.evaluation.people import load


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    file = tmp_path / "people.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for k, who in enumerate(make_people(6)):
            record = who.profile.to_json() | {"split": "train" if k > 3 else "test"}
            record["conversation"] = [message.chat() for message in who.dialogue]
            stream.write(json.dumps(record) + "\n")
    return file


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "load", lambda embedder, judge: make_scorers(judge=judge))


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    commands_evaluate.add_options(parser)
    return commands_evaluate.evaluate(parser.parse_args(options))


def test_users_side_by_side(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    options = ("--user", f"replay:{bank}", "--user", "scripted", "--assistant", "echo", "--bank", str(bank), "--out", str(out))
    assert run(*options) == 0
    card = read_card(out)
    assert list(card["users"]) == [f"replay:{bank}", "scripted", REAL, NEIGHBOUR]
    assert card["people"]["n"] == card["people"]["of"] == 4
    assert card["users"][f"replay:{bank}"]["conversation"]["sem_sim"]["mean"] == 100
    assert "card.md" in capsys.readouterr().out
    assert (out / "cost.json").is_file()
    with pytest.raises(RunDirectoryError):
        run(*options)
    before = (out / "card.json").read_bytes()
    assert run(*options, "--resume") == 0
    assert (out / "card.json").read_bytes() == before


def test_a_card_with_its_run_beside_it(bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "card.json"
    options = ("--user", "scripted", "--bank", str(bank), "--levels", "utterance", "-n", "2", "--out", str(out), "--quiet")
    assert run(*options) == 0
    card = read_card(out)
    assert card["people"]["n"] == 2
    assert card["people"]["of"] == 4
    assert card["users"]["scripted"]["conversation"] == {}
    assert (tmp_path / "card.md").is_file()
    assert (tmp_path / "card" / "run.json").is_file()
    (tmp_path / "card").rename(tmp_path / "moved")
    with pytest.raises(SpecError, match="the file exists"):
        run(*options)


def test_what_stands_beside_the_card_is_not_overwritten_unasked(bank: Path, tmp_path: Path) -> None:
    notes = tmp_path / "RESULTS.md"
    notes.write_text("typed for a week", "utf-8")
    options = ("--user", "scripted", "--bank", str(bank), "--levels", "utterance", "-n", "2", "--quiet")
    with pytest.raises(SpecError, match="RESULTS.md: the file exists"):
        run(*options, "--out", str(tmp_path / "RESULTS.json"))
    assert notes.read_text("utf-8") == "typed for a week"
    assert not (tmp_path / "RESULTS").exists()
    assert run(*options, "--out", str(tmp_path / "RESULTS.json"), "--overwrite") == 0
    assert "# Quality card" in notes.read_text("utf-8")


def test_a_fair_sample_is_a_part_of_every_larger_one(bank: Path) -> None:
    people = load(str(bank), "test")
    assert [who.id for who in people] == [who.id for who in load(str(bank), "test")]
    assert {who.id for who in people} == {"p0", "p1", "p2", "p3"}
    assert len(load(str(bank), None)) == 6


def test_mistakes_are_told(bank: Path, tmp_path: Path) -> None:
    base = ("--bank", str(bank), "--out", str(tmp_path / "x"))
    with pytest.raises(UnknownNameError, match="did you mean 'utterance'"):
        run("--user", "scripted", *base, "--levels", "utterances")
    with pytest.raises(SpecError, match="usp-env chat"):
        run("--user", "human", *base)
    with pytest.raises(UnknownNameError, match="split"):
        run("--user", "scripted", *base, "--split", "val")
    assert not (tmp_path / "x").exists()


def test_who_is_given_the_profile() -> None:
    given = {
        spec: commands_evaluate.takes_profile(spec) for spec in ("usp:x", "plato:x?top_p=1", "dialogue:x", "userlm:x", "agenda")
    }
    assert given == {"usp:x": True, "plato:x?top_p=1": False, "dialogue:x": False, "userlm:x": True, "agenda": True}


def test_the_map_is_of_the_split_that_is_evaluated(bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("usp_env.sampling.load_fitted", lambda *place: asked.append(place))
    options = ("--user", "scripted", "--bank", str(bank), "--levels", "utterance", "-n", "1", "--quiet", "--no-neighbours")
    for split in ("train", "all"):
        assert run(*options, "--split", split, "--out", str(tmp_path / split)) == 0
    assert asked == [(str(bank), "train"), (str(bank), None)]


def test_a_dtype_reaches_the_models_of_this_process_that_tell_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(backends, "load", lambda spec: asked.append(str(spec)))
    for spec in ("tiny", "tiny?dtype=float32", "openai:m@http://localhost/v1"):
        commands_evaluate._engine(parse(spec), "bfloat16")
    commands_evaluate._engine(parse("tiny"), None)
    assert asked == ["tiny?dtype=bfloat16", "tiny?dtype=float32", "openai:m@http://localhost/v1", "tiny"]
