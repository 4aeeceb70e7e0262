"""Conversations through steps, one at a time, with a report of what each step did. The steps are in `preprocessing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from usp_env.data.conversations import Conversation
from usp_env.errors import SpecError


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a pipeline.

    Args:
        name: Its row in the report; unique in a pipeline.
        apply: What becomes of a conversation: nothing (it is dropped), itself, a changed one, or several.
    """

    name: str
    apply: Callable[[Conversation], Sequence[Conversation]]


@dataclass(slots=True)
class Tally:
    """What one step did; each example is the id of the first conversation it happened to.

    Args:
        seen: Conversations that reached it.
        dropped: Those that went no further.
        changed: Those that went on with other turns, or as several.
        turns: Turns that the step rewrote or left out in the conversations that it changed and did not split.
        out: Conversations that left it.
    """

    seen: int = 0
    dropped: int = 0
    changed: int = 0
    turns: int = 0
    out: int = 0
    dropped_example: str | None = None
    changed_example: str | None = None

    def count(self, before: Conversation, after: Sequence[Conversation]) -> None:
        """Add what happened to one conversation."""
        self.seen += 1
        self.out += len(after)
        if not after:
            self.dropped += 1
            self.dropped_example = self.dropped_example or before.id
        elif len(after) > 1 or after[0].dialogue is not before.dialogue:
            self.changed += 1
            self.changed_example = self.changed_example or before.id
            if len(after) == 1:
                kept = {id(message) for message in after[0].dialogue}
                self.turns += sum(id(message) not in kept for message in before.dialogue)


@dataclass(slots=True)
class Report:
    """What each step of a pipeline did, in the pipeline's order; complete when the stream has ended."""

    steps: dict[str, Tally] = field(default_factory=dict)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The tallies as plain dicts."""
        return {name: asdict(tally) for name, tally in self.steps.items()}

    def __str__(self) -> str:
        rows = [f"{'step':<24}{'seen':>9}{'dropped':>9}{'changed':>9}{'turns':>9}{'out':>9}  example"]
        for name, t in self.steps.items():
            example = t.dropped_example or t.changed_example or ""
            rows.append(f"{name:<24}{t.seen:>9}{t.dropped:>9}{t.changed:>9}{t.turns:>9}{t.out:>9}  {example}")
        return "\n".join(rows)


def pipeline(
    conversations: Iterable[Conversation], steps: Iterable[Step], report: Report | None = None
) -> Iterator[Conversation]:
    """Run conversations through the steps, one at a time.

    Args:
        conversations: Any stream, e.g. `load(...)`.
        steps: In order. `dedupe` remembers what it has seen: make a new one for each run.
        report: Filled while the stream runs.

    Raises:
        SpecError: Two steps share a name.

    Example:
        >>> from usp_env.dialogue import Dialogue
        >>> short = Step("short", lambda c: [c] if len(c.id) < 2 else [])
        >>> report = Report()
        >>> kept = pipeline([Conversation(id, Dialogue()) for id in ("a", "bb")], [short], report)
        >>> [c.id for c in kept], report.steps["short"].dropped_example
        (['a'], 'bb')
    """
    stream: Iterator[Conversation] = iter(conversations)
    report = Report() if report is None else report
    for step in steps:
        if step.name in report.steps:
            raise SpecError(f"expected steps with different names and a new report for each run, got {step.name!r} twice")
        report.steps[step.name] = tally = Tally()
        stream = _run(stream, step, tally)
    return stream


def _run(stream: Iterator[Conversation], step: Step, tally: Tally) -> Iterator[Conversation]:
    for conversation in stream:
        after = step.apply(conversation)
        tally.count(conversation, after)
        yield from after
