"""Blinded sheets: nothing tells a model, sides are balanced, filled sheets are counted right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doubles import Speaker

from usp_env.env import DialogueEnv
from usp_env.errors import RunDirectoryError, SpecError
from usp_env.evaluation import sheets
from usp_env.evaluation.sheets import Pair, Tally
from usp_env.transcripts import Transcript, read_transcripts

PAIRS = [Pair(f"e{i}", "alpha", "beta", f"answer one {i}", f"answer two {i}", f"question {i}") for i in range(10)]


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]


def fill(folder: Path, name: str, choose: object) -> Path:
    """A filled sheet: `choose(item, models by side)` gives the choice."""
    key = {entry["item"]: entry for entry in json.loads((folder / sheets.KEY).read_text("utf-8"))["items"]}
    rows = [row | {"choice": choose(row["item"], key[row["item"]])} for row in lines(folder / sheets.SHEET)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def side(key: dict[str, str], model: str) -> str:
    return "A" if key["A"] == model else "B"


def test_a_sheet_is_blind_shuffled_and_balanced(tmp_path: Path) -> None:
    file = sheets.write(PAIRS, tmp_path / "s", seed=3)
    text = file.read_text("utf-8")
    assert "alpha" not in text
    assert "beta" not in text
    assert all(pair.case not in text for pair in PAIRS)
    rows, key = lines(file), json.loads((tmp_path / "s" / sheets.KEY).read_text("utf-8"))["items"]
    assert [row["item"] for row in rows] == list(range(1, 11))
    assert [entry["case"] for entry in key] != [pair.case for pair in PAIRS]
    assert sum(entry["A"] == "alpha" for entry in key) == 5
    for row, entry in zip(rows, key, strict=True):
        number = entry["case"][1:]
        assert row["context"] == f"question {number}"
        assert row["A"] == f"answer {'one' if entry['A'] == 'alpha' else 'two'} {number}"
        assert row["choice"] == ""
    sheets.write(PAIRS, tmp_path / "t", seed=3)
    assert (tmp_path / "t" / sheets.SHEET).read_bytes() == file.read_bytes()
    sheets.write(PAIRS, tmp_path / "u", seed=4)
    assert (tmp_path / "u" / sheets.SHEET).read_bytes() != file.read_bytes()


def test_filled_sheets_are_counted_by_model(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    sheets.write(PAIRS, tmp_path, seed=0)
    ann = fill(tmp_path, "ann", lambda item, key: side(key, "alpha") if item <= 6 else "tie" if item <= 8 else side(key, "beta"))
    bob = fill(tmp_path, "bob", lambda item, key: f" {side(key, 'alpha').lower()} " if item <= 6 else "" if item <= 8 else "Tie")
    told = sheets.agreement([ann, bob], tmp_path / sheets.KEY)
    assert told.models == {"alpha": Tally(12, 4, 2), "beta": Tally(2, 4, 12)}
    assert told.pairs == {"alpha vs beta": Tally(12, 4, 2)}
    assert (told.items, told.filled, told.shared) == (10, 18, 8)
    assert told.fleiss is not None
    alone = sheets.agreement([ann], tmp_path / sheets.KEY)
    assert alone.fleiss is None
    assert alone.cohen == {}


def test_kappa_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    sheets.write(PAIRS, tmp_path, seed=0)
    # Of 10 items both say A on 4, both B on 3, they differ on 3: p_o = .7; ann A 6, bob A 5: p_e = .6 · .5 + .4 · .5 = .5
    ann = fill(tmp_path, "ann", lambda item, key: "A" if item in (1, 2, 3, 4, 5, 6) else "B")
    bob = fill(tmp_path, "bob", lambda item, key: "A" if item in (1, 2, 3, 4, 7) else "B")
    told = sheets.agreement([ann, bob], tmp_path / sheets.KEY)
    assert told.cohen == {f"{ann}/{bob}": pytest.approx(0.4)}
    # Fleiss: P = .7; A has 11 of 20 labels: P_e = .55² + .45² = .505
    assert told.fleiss == pytest.approx((0.7 - 0.505) / (1 - 0.505))
    same = fill(tmp_path, "cy", lambda item, key: "A")
    assert sheets.agreement([same], tmp_path / sheets.KEY).models["alpha"] == Tally(5, 0, 5)  # sides are balanced
    twin = fill(tmp_path, "di", lambda item, key: "A")
    assert sheets.agreement([same, twin], tmp_path / sheets.KEY).cohen == {f"{same}/{twin}": None}


def test_pairs_are_of_conversations_that_began_alike(tmp_path: Path, sampler: object) -> None:
    def played(name: str, seeds: tuple[int, ...]) -> list[Transcript]:
        user = Speaker(lambda view, seed: "" if name in str(view.messages) else f"so {seed % 100}")
        env = DialogueEnv(user, sampler, population="uniform", max_turns=2, record=tmp_path / name)
        for seed in seeds:
            env.reset(seed=seed)
            env.step(f"{name} helps" if name != "gone" else name)
            if not env.episode.done:
                env.step("and more")
        return read_transcripts(tmp_path / name)

    both = {"one": played("other", (0, 1)), "two": played("none", (1, 2))}
    assert not sheets.pairs_of("one", "two", both)  # the users fell silent: invalid
    good = [Speaker(lambda view, seed: f"so {seed % 100}") for _ in range(2)]
    for name, user, seeds in zip(("a", "b"), good, ((0, 1), (1, 2)), strict=True):
        env = DialogueEnv(user, sampler, population="uniform", max_turns=1, record=tmp_path / name)
        for seed in seeds:
            env.reset(seed=seed)
            env.step(f"from {name}")
    (pair,) = sheets.pairs_of("a", "b", {name: read_transcripts(tmp_path / name) for name in ("a", "b")})
    assert (pair.first, pair.second) == ("a", "b")
    assert '"from a"' in pair.first_text
    assert '"from b"' in pair.second_text
    assert pair.first_text.split("\n")[0] == pair.second_text.split("\n")[0]


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="at least one pair"):
        sheets.write([], tmp_path)
    with pytest.raises(SpecError, match="different"):
        sheets.write([PAIRS[0]._replace(second="alpha")], tmp_path)
    sheets.write(PAIRS, tmp_path, seed=0)
    with pytest.raises(RunDirectoryError, match="filled"):
        sheets.write(PAIRS, tmp_path, seed=0)
    good = fill(tmp_path, "good", lambda item, key: "A")
    for bad, told in (
        ('{"item": 99, "choice": "A"}', "not in the key"),
        ('{"item": 1, "choice": "A"}\n{"item": 1, "choice": "B"}', "twice"),
        ('{"item": 1, "choice": "C"}', "A, B or tie"),
        ('{"item": 1}', "choice"),
        ("nonsense", "line 1"),
    ):
        file = tmp_path / "bad.jsonl"
        file.write_text(bad + "\n", "utf-8")
        with pytest.raises(SpecError, match=told):
            sheets.agreement([good, file], tmp_path / sheets.KEY)
    with pytest.raises(SpecError, match="there is none"):
        sheets.agreement([tmp_path / "nobody.jsonl"], tmp_path / sheets.KEY)
    with pytest.raises(SpecError, match="key"):
        sheets.agreement([good], tmp_path / "nokey.json")
    with pytest.raises(SpecError, match="each once"):
        sheets.agreement([good, good], tmp_path / sheets.KEY)
    (tmp_path / "k.json").write_text("[]", "utf-8")
    with pytest.raises(SpecError, match="key"):
        sheets.agreement([good], tmp_path / "k.json")
