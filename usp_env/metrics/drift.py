"""Consistency turn by turn, and how it changes along a conversation.

After Abdulhai et al., "Consistently Simulating Human Personas with Multi-Turn Reinforcement Learning" (2025), who ask a judge of
each line whether it contradicts the prompt (prompt-to-line) or an earlier line (line-to-line), and whether questions about the
persona are answered in its sense (Q&A). Here models come in as arguments and give probabilities.

Values per turn are one matrix for `n` dialogues, (n, K), K the most user turns of any: row i is NaN after dialogue i's end, and
where a turn is not judged. `turn_curve` averages its columns and `slope` fits a line to each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError
from usp_env.metrics.consistency import (
    DialogueTurns,
    FactualConsistency,
    FloatArray,
    ProfileText,
    Verifier,
    mean_defined,
    shares,
)

Pairwise = Callable[[Sequence[str], Sequence[str]], npt.NDArray[Any]]
"""Two lists of `n` texts to (n,), in [0, 1]."""


def prompt_to_line(profiles: Sequence[ProfileText], dialogues: Sequence[DialogueTurns], verifier: Verifier) -> FloatArray:
    """p(the profile explains the turn), turn by turn; a row's mean is the dialogue's r-DP.P.

    Returns:
        (n, K), in [0, 1]; NaN after the end, for blank turns, and in the row of a blank profile.

    Example:
        >>> class Cooks:
        ...     def explains(self, profiles, turns):
        ...         return np.array([float("cook" in turn) for turn in turns])
        >>> talks = [DialogueTurns(("i cook", "i sew")), DialogueTurns(("cook?",))]
        >>> prompt_to_line([ProfileText("You cook.")] * 2, talks, Cooks())
        array([[ 1.,  0.],
               [ 1., nan]])
    """
    return pad(FactualConsistency(profiles, dialogues).scores(verifier))


def line_to_line(dialogues: Sequence[DialogueTurns], contradicts: Pairwise) -> FloatArray:
    """1 − the largest P(contradiction) between a turn and one of the user's own earlier turns.

    It needs an NLI model that knows contradiction, such as the `contradiction` column of a `usp_env.models.hub.Classifier`; none
    is packaged. Such models read statements: requests, most of what users write, are neutral to them, and count as consistent.

    Args:
        dialogues: What each user said, (n,).
        contradicts: Earlier turns and later turns, m of each, to P(the later contradicts the earlier), (m,), in [0, 1]; called
            once, with every pair of every dialogue (K(K − 1)/2 of each).

    Returns:
        (n, K), in [0, 1]; NaN for a first turn, after the end, and for blank turns.

    Example:
        >>> never = lambda earlier, later: np.array([float("never" in b and "never" not in a) for a, b in zip(earlier, later)])
        >>> line_to_line([DialogueTurns(("i eat fish", "with salt?", "i never eat fish"))], never)
        array([[nan,  1.,  0.]])
    """
    rows = [
        (i, j, k)
        for i, dialogue in enumerate(dialogues)
        for k, turn in enumerate(dialogue.turns)
        for j in range(k)
        if turn.strip() and dialogue.turns[j].strip()
    ]
    earlier = [dialogues[i].turns[j] for i, j, _ in rows]
    later = [dialogues[i].turns[k] for i, _, k in rows]
    p = shares(contradicts(earlier, later), len(rows), "contradicts") if rows else np.zeros(0)
    out = [np.full(len(dialogue.turns), np.nan) for dialogue in dialogues]
    for (i, _, k), value in zip(rows, p, strict=True):
        out[i][k] = np.fmin(out[i][k], 1.0 - value)  # fmin passes over the NaN that stands there first
    return pad(out)


def line_support(dialogues: Sequence[DialogueTurns], verifier: Verifier) -> FloatArray:
    """p(the user's own earlier turns support the turn): what the packaged verifier can say in the place of `line_to_line`.

    It sees a turn that leaves what the person has talked about, and names and numbers that come from nowhere. It does not see
    contradiction: "I am 30" after "I am 20" has everything in common but a number, and a new request is as unsupported as a lie.
    Compare it with real users' curve; no level of it is right by itself.

    Returns:
        (n, K), in [0, 1]; NaN for turns before which nothing was said, after the end, and for blank turns.

    Example:
        >>> class Before:
        ...     def supported(self, turns, facts):
        ...         return np.array([float(fact in own) for own, fact in zip(turns, facts)])
        >>> line_support([DialogueTurns(("leeks", "soup", "leeks"))], Before())
        array([[nan,  0.,  1.]])
    """
    rows = [
        (i, k)
        for i, dialogue in enumerate(dialogues)
        for k, turn in enumerate(dialogue.turns)
        if turn.strip() and any(text.strip() for text in dialogue.turns[:k])
    ]
    before, facts = [dialogues[i].turns[:k] for i, k in rows], [dialogues[i].turns[k] for i, k in rows]
    p = shares(verifier.supported(before, facts), len(rows), "verifier") if rows else np.zeros(0)
    out = [np.full(len(dialogue.turns), np.nan) for dialogue in dialogues]
    for (i, k), value in zip(rows, p, strict=True):
        out[i][k] = value
    return pad(out)


class Answerer(Protocol):
    """Answers questions in the name of people; a user's backend, or a reader of its dialogue."""

    def __call__(self, people: Sequence[int], questions: Sequence[str], attempt: int) -> Sequence[str | None]:
        """One answer for each question, asked of person `people[i]`; None where a call failed or gave nothing."""
        ...


def qa_consistency(
    profiles: Sequence[ProfileText],
    question: Callable[[Sequence[str]], Sequence[str | None]],
    answer: Answerer,
    agree: Pairwise,
    *,
    against: str = "fact",
) -> FloatArray:
    """Q&A consistency: are questions about the profile answered in its sense, or twice in the same sense?

    Args:
        profiles: The profiles that were given, (n,); each atomic fact is asked for.
        question: Facts to a question for each; None where a fact cannot be asked for.
        answer: See `Answerer`; one call for each attempt, with every question of every person.
        agree: P(two texts say the same), (m,), in [0, 1]: the expected answer first, which is the fact or the first answer.
        against: `"fact"` compares one answer with the fact (accuracy); `"again"` compares two answers to the same question
            (stability, which a user that is constantly wrong has too).

    Returns:
        Mean over a person's answered questions, (n,), in [0, 1]; NaN where none was answered.

    Raises:
        SpecError: `against` is neither, or a callable returns a list of another length.
        BackendError: Whatever the callables let through.

    Example:
        >>> same = lambda a, b: np.array([float(x == y) for x, y in zip(a, b)])
        >>> qa_consistency([ProfileText("You cook. You sew.")], lambda facts: ["What do you do?"] * len(facts),
        ...                lambda people, questions, attempt: ["You cook."] * len(questions), same)
        array([0.5])
    """
    if against not in ("fact", "again"):
        raise SpecError(f"against: expected 'fact' or 'again', got {against!r}")
    asked = [(i, fact) for i, profile in enumerate(profiles) for fact in profile.facts()]
    if not asked:
        return np.full(len(profiles), np.nan)
    found = _of_length(question([fact for _, fact in asked]), len(asked), "question")
    rows = [(i, fact, text) for (i, fact), text in zip(asked, found, strict=True) if text]
    people, questions = [i for i, _, _ in rows], [text for _, _, text in rows]
    given = [
        _of_length(answer(people, questions, attempt), len(rows), "answer") for attempt in range(1 + (against == "again")) if rows
    ]
    expected = [fact for _, fact, _ in rows] if against == "fact" else given[0] if given else []
    pairs = [(i, a, b) for i, a, b in zip(people, expected, given[-1] if given else [], strict=True) if a and b]
    p = shares(agree([a for _, a, _ in pairs], [b for _, _, b in pairs]), len(pairs), "agree") if pairs else np.zeros(0)
    owner = np.array([i for i, _, _ in pairs], dtype=int)
    return np.array([mean_defined(p[owner == i]) for i in range(len(profiles))], dtype=np.float64)


class TurnCurve(NamedTuple):
    """The mean dialogue, turn by turn.

    Attributes:
        mean: Over the dialogues that have a value at the turn, (K,); NaN where none has.
        dialogues: How many those are, (K,): late turns are those of long conversations alone.
    """

    mean: FloatArray
    dialogues: npt.NDArray[np.int64]


def turn_curve(values: FloatArray) -> TurnCurve:
    """Average the columns of an (n, K) matrix, NaN left out.

    Example:
        >>> turn_curve(np.array([[1.0, 0.5], [0.0, np.nan]]))
        TurnCurve(mean=array([0.5, 0.5]), dialogues=array([2, 1]))
    """
    table = _matrix(values)
    means = np.array([mean_defined(column) for column in table.T], dtype=np.float64)
    return TurnCurve(means, (~np.isnan(table)).sum(axis=0).astype(np.int64))


def slope(values: FloatArray) -> FloatArray:
    """Drift: the least-squares slope of each dialogue's values over the turn number; negative is losing the profile.

    Args:
        values: (n, K), NaN where there is no value.

    Returns:
        Change for one more turn, (n,); NaN with fewer than two values.

    Example:
        >>> slope(np.array([[1.0, 0.8, 0.6], [0.5, np.nan, np.nan]])).round(2)
        array([-0.2,  nan])
    """
    table = _matrix(values)
    there = ~np.isnan(table)
    n = np.maximum(there.sum(axis=1, keepdims=True), 1)
    x = np.where(there, np.arange(table.shape[1], dtype=np.float64), 0.0)
    y = np.where(there, table, 0.0)
    dx = np.where(there, x - x.sum(axis=1, keepdims=True) / n, 0.0)
    spread = (dx**2).sum(axis=1)
    return np.asarray(np.where(spread > 0, (dx * y).sum(axis=1) / np.where(spread > 0, spread, 1.0), np.nan), dtype=np.float64)


def pad(rows: Sequence[npt.ArrayLike]) -> FloatArray:
    """Rows of different lengths as one matrix, (n, longest), NaN where a row has ended.

    Example:
        >>> pad([[1, 2], [3]])
        array([[ 1.,  2.],
               [ 3., nan]])
    """
    arrays = [np.asarray(row, dtype=np.float64) for row in rows]
    out = np.full((len(arrays), max(map(len, arrays), default=0)), np.nan)
    for i, row in enumerate(arrays):
        out[i, : len(row)] = row
    return out


def _matrix(values: FloatArray) -> FloatArray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise SpecError(f"expected values of shape (dialogues, turns), got {table.shape}")
    return table


def _of_length(found: Sequence[str | None], n: int, name: str) -> Sequence[str | None]:
    if isinstance(found, str) or len(found) != n:
        raise SpecError(f"{name}: expected a list of {n} texts, got {found!r:.80}")
    return found
