"""The benchmark's judge: let through a gate, asked once about every episode and every pair, its answers kept in files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from usp_env.dialogue import Dialogue
from usp_env.errors import RunDirectoryError
from usp_env.files import read_text, write_whole
from usp_env.metrics.calibration import ANCHORS, Anchor, SpeakerCase, admit, speaker_cases
from usp_env.metrics.judges import Judge, Verdict, cut, transcript
from usp_env.metrics.judging import RUBRICS, Comparison, compare, rate
from usp_env.transcripts import Transcript

CASES = 20
"""Excerpts whose last speaker the judge has to tell."""
BATCH = 64
"""Questions that are asked, and written down, at a time."""
WORST = 1.0
"""What an assistant gets that said nothing: the judge cannot be asked about it."""


class Jury(NamedTuple):
    """What the gate asks.

    Attributes:
        cases: Excerpts whose last speaker is to be told.
        anchors: Conversations whose quality is beyond doubt.
    """

    cases: Sequence[SpeakerCase]
    anchors: Sequence[Anchor] = ANCHORS


def gate(judge: Judge, calibration: Jury | None, file: Path) -> dict[str, Any]:
    """Let the judge pass the gate; one that passed before, in this directory, need not again.

    Raises:
        JudgeRefusedError: It did not pass.
    """
    if (known := _passed(file)) is not None and known.get("judge") == judge.name:
        return known
    jury = calibration or Jury(speaker_cases(real_dialogues()))
    passed = admit(judge, jury.cases, jury.anchors)
    report = {"judge": judge.name, **{key: None if value != value else value for key, value in passed._asdict().items()}}
    write_whole(file, json.dumps(report, indent=1) + "\n")
    return report


def _passed(file: Path) -> dict[str, Any] | None:
    """What a judge passed the gate with before; None where there is nothing, or a damaged file: then it is asked again."""
    try:
        known = json.loads(read_text(file, RunDirectoryError)) if file.is_file() else None
    except ValueError:
        return None
    return known if isinstance(known, dict) else None


def real_dialogues(n: int = CASES) -> list[Dialogue]:
    """The first conversations of the packaged bank's `val` split.

    Raises:
        MissingAssetError: The data set has not been fetched.
    """
    from usp_env.data.conversations import load
    from usp_env.profiles import ProfileBank

    ids = {profile.id for profile in list(ProfileBank.load("sharegpt", "val"))[: 2 * n]}
    found = (conversation.dialogue for conversation in load("sharegpt", ids=ids))
    return [dialogue for dialogue, _ in zip((d for d in found if len(d) > 1), range(n), strict=False)]


def judge_episodes(judge: Judge, played: Sequence[Transcript], file: Path) -> dict[str, float]:
    """Ratings from 1 to 10 by episode id, NaN where the judge gave none; asked about once, kept in `file`.

    An assistant that was silent in a valid episode gets the lowest rating. A call that failed is asked again with the next run.
    """
    known = _read(file)
    asked = [t for t in played if t.valid and t.episode_id not in known]
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        silent = [not any(m["content"].strip() for m in t.messages if m["role"] == "assistant") for t in batch]
        spoken = iter(rate(judge, [t.dialogue() for t, mute in zip(batch, silent, strict=True) if not mute]))
        verdicts = [Verdict(WORST, "it said nothing") if mute else next(spoken) for mute in silent]
        known.update(_keep(file, [t.episode_id for t in batch], verdicts))
    return {t.episode_id: known.get(t.episode_id, math.nan) for t in played}


def judge_duels(judge: Judge, played: Mapping[str, Sequence[Transcript]], file: Path) -> dict[tuple[str, str, str], float]:
    """What the judge finds between every two assistants' conversations that began alike: 1, 0.5 or 0 for the first."""
    known = _read(file)
    found = {}
    for first, second in combinations(played, 2):
        other = {t.episode_id: t for t in played[second] if t.valid}
        both = [(t, other[t.episode_id]) for t in played[first] if t.valid and t.episode_id in other]
        keys = [json.dumps([first, second, t.episode_id]) for t, _ in both]
        asked = [i for i, key in enumerate(keys) if key not in known]
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            duel = compare(judge, [_comparison(*both[i]) for i in batch], RUBRICS["helpfulness"])
            failed = [duel.verdicts[k].error or duel.verdicts[k + len(batch)].error for k in range(len(batch))]
            told = [Verdict((float(o) + 1) / 2, error=e) for o, e in zip(duel.outcome, failed, strict=True)]
            known.update(_keep(file, [keys[i] for i in batch], told))
        found.update({(first, second, t.episode_id): known.get(k, math.nan) for k, (t, _) in zip(keys, both, strict=True)})
    return found


def _comparison(first: Transcript, second: Transcript) -> Comparison:
    opening = first.messages[0]["content"] if first.messages else ""
    return Comparison(transcript(first.dialogue()), transcript(second.dialogue()), cut(opening))


def _read(file: Path) -> dict[str, float]:
    """Answers that are there; a last line that a crash cut off is left out."""
    if not file.is_file():
        return {}
    whole, _, torn = file.read_bytes().rpartition(b"\n")
    if torn:
        file.write_bytes(whole + b"\n" if whole else b"")
    records = [json.loads(line) for line in whole.decode().split("\n") if line]
    return {record["key"]: math.nan if record["value"] is None else record["value"] for record in records}


def _keep(file: Path, keys: Sequence[str], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Append answers; what failed is left out, so that it is asked again."""
    told = {key: verdict for key, verdict in zip(keys, verdicts, strict=True) if verdict.error is None}
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        for key, v in told.items():
            value = None if math.isnan(v.value) else v.value
            stream.write(json.dumps({"key": key, "value": value, "reason": v.reason or v.complaint}, ensure_ascii=False) + "\n")
    return {key: verdict.value for key, verdict in told.items()}
