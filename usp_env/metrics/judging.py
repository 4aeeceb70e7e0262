"""What judges are asked: to rate an assistant, and to compare two texts in both orders; one judge or several.

After MT-Bench (Zheng et al., NeurIPS 2023), which found that judges prefer a place; prompts in our words.

    judge = Judge(usp_env.backends.load("openai:gpt-4o"))              usp_env.metrics.judges
    scores = values(rate(judge, dialogues))                            1 to 10 for the assistant
    duel = compare(judge, comparisons, RUBRICS["authenticity"])        1 first wins, -1 second wins, 0 tie
    winners = majority([compare(j, comparisons, rubric).outcome for j in several])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue, visible
from usp_env.errors import SpecError
from usp_env.metrics.consistency import FloatArray
from usp_env.metrics.judges import Judge, Question, Verdict, chosen, scored, transcript, values

RATE = """Above is a conversation, one JSON object a line. Rate the ASSISTANT over the whole conversation, from 1 to 10: does it \
do what the user asks for, turn after turn; is what it says right, relevant and as deep as the user needs; does it keep to what \
was said before, and is it clear and no longer than it must be?
1-2: useless or wrong; 3-4: misses most of what was asked; 5-6: helps in part; 7-8: good, with small faults; 9-10: hardly to be \
improved. An assistant that only repeats, evades, or talks of something else gets 1 or 2, however well it reads.
Answer in the form {"score": <number from 1 to 10>, "reason": "<one or two sentences>"}."""

RUBRICS = {
    "authenticity": "Both texts are the user's side of a conversation with an AI assistant. Which of them is more likely to have "
    "been written by the real person whose words are the context: in what is asked for, in the manner of writing, and in how "
    "naturally one turn follows the other?",
    "consistency": "Both texts are the user's side of a conversation with an AI assistant, played from the profile that is the "
    "context. Which of them fits the profile better: nothing that contradicts it, as much of it as the conversation gives "
    "occasion to show, and without reciting it?",
    "helpfulness": "Both texts are an assistant's answers to the conversation that is the context. Which of them serves the user "
    "better: right, relevant, complete, clear, and no longer than it must be?",
}
"""What a comparison can ask for; authenticity and consistency are the axes of the paper's human evaluation (Table 5)."""

COMPARE = 'Answer in the form {"winner": "A" or "B" or "tie", "reason": "<one or two sentences>"}.'


def rate(judge: Judge, dialogues: Sequence[Dialogue]) -> list[Verdict]:
    """Single-answer grading of the assistant over a whole conversation, 1 to 10 (after MT-Bench).

    Returns:
        One verdict per dialogue; not asked, and NaN, where the assistant said nothing.
    """
    asked = [
        scored(f"{transcript(dialogue)}\n---\n{RATE}", 1, 10) if "".join(dialogue.utterances("assistant")).strip() else None
        for dialogue in dialogues
    ]
    return judge.ask(asked)


class Comparison(NamedTuple):
    """Two texts to be compared; the judge is shown all of them, and gives no verdict where its context is too short.

    A conversation is shortened utterance by utterance (`usp_env.metrics.judges.transcript`), never at its end: that counts too.

    Attributes:
        first: One text.
        second: The other.
        context: What both belong to: a profile, a real person's words, a conversation.
    """

    first: str
    second: str
    context: str = ""


class Duel(NamedTuple):
    """Outcomes of `n` comparisons: 1 the first text wins, -1 the second, 0 tie, NaN no verdict; each (n,).

    Attributes:
        outcome: What both orders agree on; 0 where they do not; NaN where one of them is missing.
        forward: With the first text shown first.
        backward: With the second text shown first, put back into the same sense.
        verdicts: All of them, the n forward ones first.
    """

    outcome: FloatArray
    forward: FloatArray
    backward: FloatArray
    verdicts: list[Verdict]


def compare(judge: Judge, comparisons: Sequence[Comparison], rubric: str) -> Duel:
    """Pairwise comparison in both orders, in one batch: a judge that goes by position comes out as a tie.

    Args:
        judge: See `Judge`.
        comparisons: The pairs, (n,).
        rubric: What decides; see `RUBRICS`.

    Example:
        >>> from usp_env.backends.scripted import ScriptedBackend
        >>> always_a = Judge(ScriptedBackend(lambda request: '{"winner": "A", "reason": "It comes first."}'))
        >>> duel = compare(always_a, [Comparison("hi", "hello")], RUBRICS["authenticity"])
        >>> duel.outcome, position_bias(duel)
        (array([0.]), 1.0)
    """
    swapped = [pair._replace(first=pair.second, second=pair.first) for pair in comparisons]
    verdicts = judge.ask([_duel_question(pair, rubric) for pair in [*comparisons, *swapped]])
    n = len(comparisons)
    forward, backward = values(verdicts[:n]), -values(verdicts[n:]) + 0.0  # no negative zero
    outcome = np.where(np.isnan(forward + backward), np.nan, np.where(forward == backward, forward, 0.0))
    return Duel(outcome, forward, backward, verdicts)


def position_bias(duel: Duel) -> float:
    """Share of comparisons in which the judge chose the same place, A or B, in both orders; NaN without any that count."""
    there = ~np.isnan(duel.forward + duel.backward)
    return float((duel.forward[there] * duel.backward[there] == -1).mean()) if there.any() else float("nan")


def majority(votes: npt.ArrayLike) -> FloatArray:
    """The outcome that most of several judges give each case; 0, a tie, where two outcomes have the most votes.

    Args:
        votes: 1, 0 or -1, NaN where a judge gave none; (judges, n).

    Returns:
        (n,); NaN where no judge voted.

    Example:
        >>> majority([[1, 1, 0], [1, -1, 0], [-1, np.nan, 1]])
        array([1., 0., 0.])
    """
    table = np.asarray(votes, dtype=np.float64)
    if table.ndim != 2 or not np.all(np.isnan(table) | np.isin(table, (-1, 0, 1))):
        raise SpecError(f"votes: expected 1, 0, -1 or NaN of shape (judges, n), got {table!r:.120} of shape {table.shape}")
    counts = np.stack([(table == outcome).sum(axis=0) for outcome in (-1, 0, 1)])  # (3, n)
    most = counts == counts.max(axis=0)
    winner = np.where(most.sum(axis=0) == 1, most.argmax(axis=0) - 1.0, 0.0)
    return np.asarray(np.where(counts.sum(axis=0) == 0, np.nan, winner), dtype=np.float64)


def panel(scores: npt.ArrayLike) -> FloatArray:
    """Median score of several judges, (judges, n) to (n,); NaN left out, NaN where no judge gave one.

    Example:
        >>> panel([[7, np.nan], [8, np.nan], [1, np.nan]])
        array([ 7., nan])
    """
    table = np.asarray(scores, dtype=np.float64)
    found = [column[~np.isnan(column)] for column in table.T]
    return np.array([np.median(column) if column.size else np.nan for column in found], dtype=np.float64)


def _duel_question(pair: Comparison, rubric: str) -> Question:
    shown = {"context": pair.context, "A": pair.first, "B": pair.second}
    data = "\n".join(
        json.dumps({key: visible(text)}, ensure_ascii=False) for key, text in shown.items() if text or key != "context"
    )
    return chosen(f"{data}\n---\n{rubric}\n{COMPARE}", "winner", {"A": 1.0, "B": -1.0, "tie": 0.0})
