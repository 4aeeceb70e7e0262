"""Blinded A/B sheets for human raters: which of two assistants served the user better?

    write(pairs, "sheets", seed=0)          sheets/sheet.jsonl to hand out, sheets/key.json to keep
    agreement(["ann.jsonl", "bob.jsonl"], "sheets/key.json")   wins, ties and losses by model, and kappa

A line of the sheet is `{"item": 3, "context": …, "A": …, "B": …, "choice": "", "comment": ""}`; a rater writes `A`, `B` or `tie`
into `choice`. Items come in random order, and which model is A is drawn for each, half of the time either: no line tells a model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from usp_env.errors import RunDirectoryError, SpecError
from usp_env.files import read_text
from usp_env.metrics.agreement import cohen_kappa, fleiss_kappa
from usp_env.metrics.judges import transcript
from usp_env.records import check_seed
from usp_env.transcripts import Transcript

SHEET, KEY = "sheet.jsonl", "key.json"
CHOICES = ("A", "B", "tie")


class Pair(NamedTuple):
    """Two texts of two models on the same case.

    Attributes:
        case: Names the case in the key (an episode's id).
        first: The first model.
        second: The second.
        first_text: What the first model did.
        second_text: What the second did.
        context: What both belong to.
    """

    case: str
    first: str
    second: str
    first_text: str
    second_text: str
    context: str = ""


@dataclass(frozen=True, slots=True)
class Tally:
    """How one model did against all others, over all raters' choices."""

    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """What filled sheets say.

    Args:
        models: Model to wins, ties and losses.
        pairs: `first vs second` to the first's wins, ties and losses.
        cohen: `rater/rater` to Cohen's kappa over the items that both filled; None where it is not defined.
        fleiss: Kappa of all raters over the items that all of them filled; None with fewer than 2 raters, or not defined.
        raters: Names of the files.
        items: On the sheet.
        filled: Choices that were made, over all raters.
        shared: Items that all raters filled.
    """

    models: Mapping[str, Tally]
    pairs: Mapping[str, Tally]
    cohen: Mapping[str, float | None]
    fleiss: float | None
    raters: Sequence[str]
    items: int
    filled: int
    shared: int


def pairs_of(first: str, second: str, played: Mapping[str, Sequence[Transcript]]) -> list[Pair]:
    """Pairs of two assistants' conversations that began alike, of a benchmark's transcripts; invalid episodes are left out."""
    other = {t.episode_id: t for t in played[second] if t.valid}
    return [
        Pair(t.episode_id, first, second, transcript(t.dialogue()), transcript(other[t.episode_id].dialogue()))
        for t in played[first]
        if t.valid and t.episode_id in other
    ]


def write(pairs: Sequence[Pair], folder: str | Path, seed: int = 0) -> Path:
    """Write a sheet and its key.

    Args:
        pairs: At least one; a name of a model in a text is not looked for.
        folder: Made if it is not there.
        seed: Of the order, and of who is A.

    Returns:
        The sheet's file.

    Raises:
        RunDirectoryError: There is a sheet or a key: filled sheets would lose theirs.
        SpecError: No pairs, or a model against itself.
    """
    rng, where = np.random.default_rng(check_seed(seed)), Path(folder)
    if not pairs or any(pair.first == pair.second for pair in pairs):
        raise SpecError("sheets: expected at least one pair of two different models")
    if (where / SHEET).exists() or (where / KEY).exists():
        raise RunDirectoryError(f"{where}: it holds a sheet already, whose filled copies need its key: choose another folder")
    # Each way round equally often, so that a rater who always takes A gives nobody an advantage.
    swapped = rng.permutation(np.arange(len(pairs)) % 2).tolist()
    lines, key = [], []
    for item, i in enumerate(rng.permutation(len(pairs)).tolist(), 1):
        pair = pairs[i]
        sides = [(pair.first, pair.first_text), (pair.second, pair.second_text)][:: -1 if swapped[i] else 1]
        shown = {"item": item, "context": pair.context, "A": sides[0][1], "B": sides[1][1], "choice": "", "comment": ""}
        lines.append(json.dumps(shown, ensure_ascii=False))
        key.append({"item": item, "case": pair.case, "A": sides[0][0], "B": sides[1][0]})
    where.mkdir(parents=True, exist_ok=True)
    (where / KEY).write_text(json.dumps({"seed": seed, "items": key}, ensure_ascii=False, indent=1) + "\n", "utf-8")
    (where / SHEET).write_text("".join(line + "\n" for line in lines), "utf-8")
    return where / SHEET


def agreement(files: Sequence[str | Path], key: str | Path) -> Agreement:
    """Read filled sheets.

    Args:
        files: One of each rater; an empty `choice` is an item that was left out.
        key: Of the sheet.

    Raises:
        SpecError: A file or the key breaks the format, or they do not belong together.
        MissingExtraError: scikit-learn is not installed (two raters or more).
    """
    items = _read_key(Path(key))
    raters = [str(file) for file in files]
    if not raters or len(set(raters)) != len(raters):
        raise SpecError(f"expected at least one filled sheet, each once, got {raters}")
    sheets = [_read_sheet(Path(file), items) for file in files]
    models: dict[str, Counter[str]] = {side: Counter() for entry in items.values() for side in (entry["A"], entry["B"])}
    pairs: dict[str, Counter[str]] = {}
    for sheet in sheets:
        for item, choice in sheet.items():
            _count(models, pairs, items[item], choice)
    shared = sorted(set.intersection(*(set(sheet) for sheet in sheets)))
    found = {f"{raters[i]}/{raters[j]}": _defined(_cohen(sheets[i], sheets[j])) for i, j in combinations(range(len(sheets)), 2)}
    fleiss = fleiss_kappa([[sheet[item] for sheet in sheets] for item in shared]) if len(sheets) > 1 else float("nan")
    return Agreement(
        {name: _tally(count) for name, count in sorted(models.items())},
        {name: _tally(count) for name, count in sorted(pairs.items())},
        found,
        _defined(fleiss),
        raters,
        len(items),
        sum(map(len, sheets)),
        len(shared),
    )


def _count(models: dict[str, Counter[str]], pairs: dict[str, Counter[str]], entry: Mapping[str, Any], choice: str) -> None:
    first, second = sorted((entry["A"], entry["B"]))
    own = pairs.setdefault(f"{first} vs {second}", Counter())
    if choice == "tie":
        models[first]["ties"] += 1
        models[second]["ties"] += 1
        own["ties"] += 1
        return
    winner, loser = entry[choice], entry["B" if choice == "A" else "A"]
    models[winner]["wins"] += 1
    models[loser]["losses"] += 1
    own["wins" if winner == first else "losses"] += 1


def _tally(count: Counter[str]) -> Tally:
    return Tally(count["wins"], count["ties"], count["losses"])


def _cohen(a: Mapping[int, str], b: Mapping[int, str]) -> float:
    both = sorted(set(a) & set(b))
    return cohen_kappa([a[item] for item in both], [b[item] for item in both])


def _defined(value: float) -> float | None:
    return None if value != value else value


def _read_key(file: Path) -> dict[int, dict[str, Any]]:
    if not file.is_file():
        raise SpecError(f"{file}: expected the key that was written with the sheet, there is none")
    try:
        read = json.loads(read_text(file, SpecError))
        return {int(entry["item"]): {side: str(entry[side]) for side in ("A", "B", "case")} for entry in read["items"]}
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{file}: expected the key that was written with the sheet ({error!r})") from error


def _read_sheet(file: Path, items: Mapping[int, Any]) -> dict[int, str]:
    """Item to choice, of those that were filled."""
    if not file.is_file():
        raise SpecError(f"{file}: expected a filled sheet, there is none")
    chosen: dict[int, str] = {}
    for number, line in enumerate(read_text(file, SpecError).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            item, choice = record["item"], str(record["choice"]).strip()
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(f"{file}, line {number}: expected an item of the sheet with its choice ({error!r})") from error
        if item not in items or item in chosen:
            raise SpecError(f"{file}, line {number}: item {item!r} is not in the key, or comes twice: is it another sheet's?")
        match = next((name for name in CHOICES if name.casefold() == choice.casefold()), None)
        if choice and match is None:
            raise SpecError(f"{file}, line {number}: expected the choice A, B or tie, or none, got {choice!r:.40}")
        if match:
            chosen[item] = match
    return chosen
