"""A run as one HTML file: no script, style, font or image from elsewhere; readable without JavaScript.

    usp-env report runs/x        writes runs/x/report.html

Everything a model said is escaped by the template; the page's policy (CSP) lets only its own script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from usp_env.dialogue import visible
from usp_env.errors import RunDirectoryError, TranscriptError, require
from usp_env.report import facts
from usp_env.report.facts import number

LONG, HEAD = 1800, 1200
"""A message of more than `LONG` characters shows its first `HEAD` or so; the rest unfolds."""

ENDS = {
    "user_ended": "The user ended the conversation.",
    "repetition": "The user repeated itself.",
    "gratitude_loop": "The user only said thanks, three times over.",
    "turn_limit": "The turn limit was reached.",
    "token_budget": "The token budget was spent.",
    "context_limit": "The next prompt would not have fitted the model's context.",
    "bad_action": "The agent's action was empty, overlong or no valid Unicode.",
    "bad_user": "The user said nothing, or spoke as the assistant.",
    "bad_assistant": "The assistant said nothing.",
    "infra": "A model or a reward failed.",
}
BAR, HEIGHT = 8, 28  # px of the reward chart


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run directory.

    Args:
        run_dir: Holds `transcripts.jsonl` and, usually, `run.json`.
        out: Where to; default `report.html` in the run directory, which is replaced.

    Returns:
        The file.

    Raises:
        TranscriptError: There are no transcripts, or a file breaks its format.
        RunDirectoryError: `out` exists.
        MissingExtraError: Jinja2 is not installed.
    """
    from usp_env.transcripts import read_transcripts

    folder = Path(run_dir)
    transcripts = [transcript.to_json() for transcript in read_transcripts(folder, torn="skip")]
    folder = folder.parent if folder.is_file() else folder
    path = place(folder / "report.html", out)
    page = render_report({"name": folder.resolve().name, **read_run(folder)}, transcripts)
    path.write_text(page, "utf-8", newline="\n")
    return path


def place(usual: Path, out: str | Path | None) -> Path:
    """Where a page goes: its usual place, where it replaces the old one, or a new file of the reader's choice.

    Raises:
        RunDirectoryError: `out` exists.
    """
    if out is not None and Path(out).exists():
        raise RunDirectoryError(f"expected a new file to write to, but {str(out)!r} exists: choose another")
    return usual if out is None else Path(out)


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` of a directory says; nothing where there is none.

    Raises:
        TranscriptError: It is no JSON object.
    """
    from usp_env.transcripts import RUN

    try:
        run = json.loads((folder / RUN).read_text("utf-8")) if (folder / RUN).is_file() else {}
    except ValueError as error:
        raise TranscriptError(f"{folder / RUN}: expected one JSON object ({error})") from error
    if not isinstance(run, dict):
        raise TranscriptError(f"{folder / RUN}: expected one JSON object, got {run!r:.80}")
    return run


def render_report(run: Mapping[str, Any], transcripts: Sequence[Mapping[str, Any]]) -> str:
    """The page. The same input gives the same text.

    Args:
        run: What `run.json` holds (all keys optional), and perhaps a `name`.
        transcripts: The objects of `transcripts.jsonl`.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    limits = _limits(transcripts)
    return fill(
        "report.html.j2",
        name=run.get("name") or "run",
        total=facts.group("all", transcripts),
        groups=facts.groups(transcripts),
        speakers={role: sorted({t["models"].get(role, "") for t in transcripts} - {""}) for role in ("user", "assistant")},
        seed=(run.get("config") or {}).get("seed"),
        facts=run_facts(run, transcripts[0]["versions"] if transcripts else {}),
        episodes=[_episode(index, t, limits) for index, t in enumerate(transcripts, 1)],
        ends=ENDS,
    )


def fill(template: str, **values: Any) -> str:
    """A page out of a template of this folder: all that `{{ }}` prints is escaped, and without control characters.

    Raises:
        MissingExtraError: Jinja2 is not installed.
        KeyError: The template wants a value that is not there.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (resources.files("usp_env.report") / name).read_text("utf-8")),
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "csp": _csp}
    try:
        page: str = environment.get_template(template).render(values)
    except jinja2.UndefinedError as error:  # as Python says it: callers need not know what fills the page
        raise KeyError(str(error)) from error
    return page


def _shown(value: Any) -> Any:
    """What the template prints: every plain string without control characters (markup of its own is left alone)."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _csp(script: str) -> str:
    """The Content-Security-Policy source that allows this script and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def run_facts(run: Mapping[str, Any], versions: Mapping[str, str]) -> list[tuple[str, str]]:
    """Name and value of what was run, in order.

    Args:
        run: What `run.json` holds.
        versions: Of the packages, where the run tells none.
    """
    command = run.get("command")
    rest = {key: value for key, value in run.items() if key not in ("name", "command", "config", "versions", "hardware")}
    rest["versions"] = run.get("versions") or versions
    rest["hardware"] = run.get("hardware")
    rows = {"command": shlex.join(map(str, command))} if isinstance(command, list) else {}
    rows |= run.get("config") or {}
    rows |= {key: value for key, value in rest.items() if value}
    return [(key, _plain(value)) for key, value in rows.items()]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items())
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _episode(index: int, transcript: Mapping[str, Any], limits: tuple[float, float]) -> dict[str, Any]:
    said, silent = facts.utterances(transcript)
    rewards, credit = list(transcript["rewards"]), list(transcript["utterance_rewards"])
    opening = transcript["messages"][0]["content"] if transcript["messages"] else ""
    return {
        "t": transcript,
        "id": visible(transcript["episode_id"]),
        "index": index,
        "turns": facts.turns(transcript),
        "opening": " ".join(opening[:400].split())[:160],
        "total": sum(rewards) if rewards else None,
        "chart": chart(rewards, limits),
        "credit": credit if credit != rewards else [],
        "silent": silent,
        "said": [_bubble(utterance) for utterance in said],
        "usage": {
            role: ", ".join(f"{n:,} {kind.removesuffix('_tokens')}" for kind, n in counts.items())
            for role, counts in transcript["usage"].items()
            if counts
        },
    }


def _bubble(utterance: facts.Utterance) -> dict[str, Any]:
    message = utterance.message
    text = visible(message["content"])
    raw = message.get("raw")
    cut = len(text)
    if cut > LONG:  # the fold falls between lines, or else between words, where there are any
        cut = next((found for found in (text.rfind(mark, HEAD // 2, HEAD) for mark in "\n ") if found > 0), HEAD)
    return {
        "u": utterance,
        "head": text[:cut],
        "rest": text[cut:].removeprefix("\n"),
        "raw": visible(raw) if raw is not None and raw.strip() != message["content"].strip() else None,
        "finish": message.get("finish_reason"),
        "tokens": (message.get("usage") or {}).get("completion_tokens"),
    }


def _limits(transcripts: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Lowest and highest reward of the run, 0 included: one scale makes the charts comparable."""
    rewards = [reward for t in transcripts for reward in t["rewards"] if math.isfinite(reward)]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    return min(0.0, low), max(0.0, high) if low < 0 or high > 0 else 1.0


def chart(rewards: Sequence[float], limits: tuple[float, float]) -> dict[str, Any]:
    """Bars of the rewards as SVG paths, one path a sign; a step of 0 leaves a line of 1 px.

    Example:
        >>> chart([1.0, -1.0], (-1.0, 1.0))
        {'width': 16, 'height': 28, 'zero': 14.0, 'up': 'M0 14v-14h7v14z', 'down': 'M8 14v14h7v-14z'}
    """
    low, high = limits
    zero = round(HEIGHT * high / (high - low), 1)
    paths = {"up": "", "down": ""}
    for index, reward in enumerate(rewards):
        height = HEIGHT * abs(reward) / (high - low) if math.isfinite(reward) else 0.0
        tall, minus = f"{max(height, 1.0):.3g}", reward < 0
        paths["down" if minus else "up"] += (
            f"M{index * BAR} {zero:g}v{'' if minus else '-'}{tall}h{BAR - 1}v{'-' if minus else ''}{tall}z"
        )
    return {"width": BAR * max(len(rewards), 1), "height": HEIGHT, "zero": zero, **paths}
