"""The card out of measurements: entries, differences, and what was evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from usp_env.evaluation import assemble, figures
from usp_env.evaluation.card import Card, Difference, Level, UserCard
from usp_env.evaluation.columns import Measurement
from usp_env.evaluation.people import digest
from usp_env.evaluation.plan import Candidate, Plan
from usp_env.evaluation.scorers import Scorers
from usp_env.transcripts import versions
from usp_env.users.base import Partner


def make_card(
    users: Sequence[Candidate],
    assistant: Partner | None,
    plan: Plan,
    scorers: Scorers,
    found: Mapping[str, Mapping[Level, Measurement]],
) -> Card:
    """The card of measurements."""
    cards = {name: {level: assemble.entries(own) for level, own in levels.items()} for name, levels in found.items()}
    names = [user.name for user in users]
    gaps: dict[str, dict[str, dict[str, list[Difference]]]] = {name: {} for name in found}
    for level in plan.levels:
        own = {name: found[name][level] for name in names if level in found[name]}
        for name, differences in assemble.differences(own).items():
            gaps[name][level] = differences
    rows: dict[str, UserCard] = {}
    known = {user.name: user for user in users}
    for name, levels in found.items():
        rows[name] = {
            "spec": known[name].speaker.spec if name in known else name,
            "profile": known[name].given if name in known else True,
            "invalid": {level: dict(own.invalid) for level, own in levels.items() if name in known},
            "jobs": {level: own.jobs for level, own in levels.items() if name in known},
            "utterance": cards[name].get("utterance", {}),
            "conversation": cards[name].get("conversation", {}),
            "differences": {level: own for level, own in gaps[name].items() if own},
        }
    invalid: Counter[str] = Counter()
    for row in rows.values():
        for counts in row["invalid"].values():
            invalid.update(counts)
    card: Card = {
        "users": rows,
        "bank": plan.bank,
        "split": plan.split,
        "people": {"n": len(plan.people), "of": len(plan.everyone), "sha256": digest(plan.people)},
        "assistant": assistant.spec if assistant else None,
        "seeds": list(plan.seeds),
        "turns": plan.turns,
        "protocol": plan.protocol,
        "judge": scorers.judge.name if scorers.judge else None,
        "scorers": scorers.names(),
        "versions": versions(),
        "invalid": dict(sorted(invalid.items())),
    }
    if calibration := figures.calibration(plan.people, scorers.human):
        card["calibration"] = calibration
    if plan.sampler is not None:
        card["map"] = figures.population_map(plan.people, plan.sampler)
    return card
