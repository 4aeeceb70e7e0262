"""Who is trained on: nobody who pasted what a person of the validation or the test pasted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from training import auxiliary
from training.conversations import held_out_turns, of_split, silver_of
from usp_env.dialogue import Dialogue
from usp_env.models import assets

PROMPT = "act as a seo and write an outline for me"  # 40 characters


def _talk(*turns: str) -> list[dict[str, str]]:
    return [message for turn in turns for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": "ok."})]


def _bank(file: Path, **people: tuple[str, str]) -> str:
    prose = {"objective": "You ask.", "subjective": "You write."}
    lines = [{"id": i, "split": s, "profile": prose, "conversation": _talk("hi", turn)} for i, (s, turn) in people.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return str(file)


def test_who_shares_a_long_turn_with_held_out_people_is_not_trained_on(tmp_path: Path) -> None:
    val, test = ("val", PROMPT), ("test", PROMPT[:-1])  # of 39 characters: two people may well write it
    gold = _bank(tmp_path / "gold.jsonl", v=val, t=test, a=("train", f" {PROMPT}\n"), b=("train", PROMPT[:-1]))
    assert held_out_turns(gold) == {PROMPT}
    assert [[profile.id for profile, _ in of_split(gold, split)] for split in ("train", "val", "test")] == [["b"], ["v"], ["t"]]
    silver = _bank(tmp_path / "silver.jsonl", s=("train", PROMPT), u=("train", PROMPT + "s"))
    assert [profile.id for profile, _ in silver_of(silver, gold)] == ["u"]


def test_nor_does_an_auxiliary_model_learn_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    opening, ending = "how do i sort the list in go", "thanks, show me the code"
    talks = {
        "own_0": Dialogue.of(_talk(opening, "and what of the maps", ending)),
        "twin_0": Dialogue.of(_talk("b", PROMPT, ending)),
    }
    found = [SimpleNamespace(id=key, dialogue=dialogue) for key, dialogue in talks.items()]
    monkeypatch.setattr(auxiliary.conversations, "load", lambda source: found)
    monkeypatch.setattr(auxiliary, "held_out_turns", lambda bank: frozenset({PROMPT}))
    assert {split: [p.id for p in people] for split, people in auxiliary.people().items()} == {
        "train": [], "val": [], "test": [], "other": ["own_0"]
    }  # fmt: skip


@pytest.mark.skipif(not assets.available("sharegpt"), reason="needs usp-env fetch sharegpt")
def test_of_the_packaged_people() -> None:
    assert "5Wro3eQ_0" not in {profile.id for profile, _ in of_split("sharegpt", "train")}  # of val: 86JITmO_0
    assert "1clzVTx_0" not in {profile.id for profile, _ in silver_of("sharegpt-silver", "sharegpt")}  # of test: P6qE00c_0
