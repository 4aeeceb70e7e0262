"""`card.md`: the card as tables. Pure: a card in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from usp_env.evaluation.assemble import COVERED
from usp_env.evaluation.card import LEVELS, METRICS, Card, Difference, Entry
from usp_env.evaluation.leaderboard import MOST_INVALID, grid

HEADLINE = (
    "sem_sim",
    "style_sim",
    "ava",
    "r_dp_p",
    "r_dpc",
    "p_cover",
    "sc_score",
    "human_likeness",
    "termination_f1",
    "esr",
    "turn_count_distance",
    "adv",
)
"""Metrics whose differences are shown; the card has the others'."""
AGAINST = ("difference", "detectable", "ratio", "n")
JOBS = {"utterance": "turns", "conversation": "conversations"}
"""What may be invalid at a level."""
COMPARED = (
    "Differences are on the same people, in the metric's unit, user less rival; a rival has values for at least "
    f"{COVERED:.0%} of the user's people, and the hardest rival is the one by whom the user stands worst. Utterance level: "
    "over the turns that both said (termination F1: all decisions), without openings where one of the two is given no "
    "profile. Conversation level: who is given no profile is given the person's own first turn and measured from the second"
    " on; against such a user both sides are without their first turns (not under protocol `paper`; ESR and numbers of "
    "turns: whole conversations), and the one with the profile still saw less of the real context. Detectable: the smallest"
    " true difference that so many people show with probability 0.8."
)
"""What a difference is, for all pages."""


def markdown(card: Card, cost: Mapping[str, Any]) -> str:
    """The card in Markdown, with what it cost."""
    people = card["people"]
    head = [
        "# Quality card",
        "",
        f"{people['n']} of {people['of']} people of `{card['bank']}` ({card['split']}); assistant `{card['assistant']}`, at most "
        f"{card['turns']} user turns; seeds {', '.join(map(str, card['seeds']))}; protocol `{card['protocol']}`.",
        scorers(card),
        *calibration(card),
        "Cells: mean [95 % interval over people and seeds] n people *the same by the held-out scorer*. Shares and cosines are in "
        "0-100; ↑ higher is better, ↓ lower is; the others are to be read beside real people. `real`: similarities are between a "
        "person's odd and even turns; `real:neighbour`: somebody else with the nearest objective facts. – is not measured.",
        "",
    ]
    body = [line for level in LEVELS for line in _level(card, level)]
    losses = ["## Invalid", "", *found] if (found := invalid(card)) else []
    return "\n".join([*head, *body, *_differences(card), *_reasons(card), *losses, *_cost(cost)]) + "\n"


def marked(card: Card, user: str, level: str) -> bool:
    """Whether so much of a user's is invalid at a level that its numbers are about the rest alone, as on a leaderboard."""
    row = card["users"][user]
    return sum(row["invalid"].get(level, {}).values()) > MOST_INVALID * row["jobs"].get(level, 0)


def named(card: Card, user: str, level: str) -> str:
    """A user in a table of a level."""
    return f"`{user}`" + (" ⚠" if marked(card, user, level) else "")


def warning(card: Card, level: str) -> list[str]:
    """What stands below such a table."""
    found = any(marked(card, user, level) for user in card["users"])
    return [f"⚠ more than {MOST_INVALID:.0%} of the {JOBS[level]} are invalid.", ""] if found else []


def scorers(card: Card) -> str:
    """Who measured, as a sentence."""
    told = [f"{part} `{own}`" + (f" (held out: `{twin}`)" if twin else "") for part, (own, twin) in card["scorers"].items()]
    return f"Scorers: {', '.join(told)}."


def calibration(card: Card) -> list[str]:
    """Whether the human-likeness detector's probabilities come true, as a sentence; none on older cards."""
    found = card.get("calibration", [])
    errors = ", ".join(f"`{own['scorer']}` {own['ece']:.2f} %" for own in found)
    return [f"Calibration error (ECE) on {found[0]['n']} real texts paired by length: {errors}."] if found else []


def _level(card: Card, level: str) -> list[str]:
    rows: dict[str, dict[str, Entry]] = {user: facts[level] for user, facts in card["users"].items() if facts[level]}  # type: ignore[literal-required]
    if not rows:
        return []
    names = [name for name in METRICS if any(name in row and row[name]["mean"] is not None for row in rows.values())]
    units = {name: f" ({METRICS[name].unit})" if METRICS[name].unit else "" for name in names}
    table = [[METRICS[name].heading + units[name], *(cell(row.get(name)) for row in rows.values())] for name in names]
    head = ["metric", *(named(card, user, level) for user in rows)]
    return [f"## {level.capitalize()} level", "", grid(head, table), "", *warning(card, level)]


def cell(entry: Entry | None) -> str:
    """A mean with its interval and people, and the same by the held-out scorer; a dash where nothing was measured."""
    if entry is None or entry["mean"] is None:
        return "–"
    text = f"{_estimate(entry)} n {entry['n']}"
    detail = entry.get("detail", {})
    if detail.get("alarm"):
        text += " **collapsed**"
    if detail.get("ended"):
        text += f" (ended at {detail['ended']} of {detail['turns'] + detail['ended']} turns)"
    twin = entry.get("twin")
    return text if twin is None else f"{text} *{_estimate(twin)}*"


def _estimate(entry: Entry) -> str:
    if entry["mean"] is None:
        return "–"
    return f"{entry['mean']:.2f}" + (" [{:.2f}, {:.2f}]".format(*entry["ci95"]) if entry["ci95"] else "")


def _differences(card: Card) -> list[str]:
    lines = []
    for level in LEVELS:
        for user, facts in card["users"].items():
            for name, (found, *_) in facts["differences"].get(level, {}).items():
                if name not in HEADLINE:
                    continue
                lines.append([level, METRICS[name].label, f"`{user}`", *against(found)])
    if not lines:
        return []
    head = ["level", "metric", "user", "hardest rival", *AGAINST]
    return ["## Differences to other users", "", COMPARED, "", grid(head, lines), ""]


def against(found: Difference) -> list[str]:
    """The rival, then the columns of `AGAINST`."""
    numbers = (found["minimum_detectable_effect"], found["ratio"])
    return [f"`{found['against']}`", signed(found), *map(plain, numbers), str(found["n"])]


def signed(found: Difference) -> str:
    """A difference with its interval, and the same by the held-out scorer."""
    if found["difference"] is None:
        return "–"
    text = f"{found['difference']:+.2f}"
    if found["ci95"]:
        text += " [{:+.2f}, {:+.2f}]".format(*found["ci95"])
    twin = found.get("twin")
    return text if twin is None else f"{text} *{signed(twin)}*"


def plain(value: float | None) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def _reasons(card: Card) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for user, facts in card["users"].items():
        for level in LEVELS:
            for name, entry in facts[level].items():
                if "reason" in entry:
                    reasons.setdefault((METRICS[name].label, entry["reason"]), []).append(f"`{user}` ({level})")
    lines = [f"- {label}, {', '.join(where)}: {reason}" for (label, reason), where in reasons.items()]
    return ["## Not measured", "", *lines, ""] if lines else []


def invalid(card: Card) -> list[str]:
    """What gave nothing to measure, by user and level."""
    lines = [
        f"- `{user}`, {', '.join(f'{outcome} {n}' for outcome, n in counts.items())} of {facts['jobs'][level]} {JOBS[level]}"
        for user, facts in card["users"].items()
        for level, counts in facts["invalid"].items()
        if counts
    ]
    return [*lines, ""] if lines else []


def _cost(cost: Mapping[str, Any]) -> list[str]:
    head = ("user", "level", "speaker", "replies", "tokens read", "tokens written", "seconds", "US$")
    lines = []
    for user, levels in cost.get("users", {}).items():
        for level, accounts in levels.items():
            for role, account in accounts.items():
                usd, read, written = (account.get(key) for key in ("usd", "prompt_tokens", "completion_tokens"))
                cells = (f"`{user}`", level, role, account["replies"], read or 0, written or 0, f"{account['seconds']:.1f}")
                lines.append([*map(str, cells), "–" if usd is None else f"{usd:.4f}"])
    if not lines:
        return []
    return ["## Cost", "", grid(head, lines), "", f"Scoring took {cost.get('scoring_seconds', 0.0):.1f} s."]
