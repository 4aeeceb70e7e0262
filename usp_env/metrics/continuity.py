"""Does the conversation go on as a person's would, and does the user stay a user?

The paper's early-stop rate (ESR, §5.3) is the share of dialogues with repetitive responses or repeated gratitude over three
turns. It can be had for nothing by ending early, so it stands beside the mean number of turns, the share that the user ended, and
the distance of the turn counts to real users'. UserLM's termination F1 (arXiv 2510.06552) asks whether a user ends where
people did. The rest is what a user does that has lost its role: copy, recite, or talk like an assistant.

Every function returns one value a dialogue, (n,), whose mean is the share or rate; NaN where it says nothing about that dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from usp_env.data.second_person import second_person
from usp_env.dialogue import Dialogue
from usp_env.endings import WINDOW, is_gratitude_loop, is_repetition, speaks_as
from usp_env.episode import END_REASONS
from usp_env.errors import SpecError, UnknownNameError
from usp_env.metrics.consistency import DialogueTurns, FloatArray, ProfileText, mean_defined, shares
from usp_env.metrics.diversity import wasserstein
from usp_env.models.facts import sentences
from usp_env.models.features import words

NGRAM = 4
HUMAN = 0.5
"""P(human) below which a turn counts as an assistant's; `human-v1` is calibrated, so this is the even odds."""

_ASSISTANT = re.compile(
    r"\A\W*(?:certainly|absolutely|sure(?: thing)?[,!] (?:here|i (?:can|will|would)|i'd|let me)|of course[,!] (?:here|i )|"
    r"as an? (?:ai|artificial|language model)|i'?m (?:sorry|afraid),? (?:but )?(?:as an|i (?:can(?:not|'t)|am unable))|"
    r"i apologi[sz]e for|i(?:'d| would) be (?:happy|glad) to (?:help|assist)|i(?:'m| am) (?:here|happy|glad) to (?:help|assist)|"
    r"i can help you|here(?:'s| is| are) (?:a|an|the|some|your)\b|how (?:can|may) i (?:help|assist)|what can i (?:help|do for)|"
    r"you(?:'re| are) (?:very |most )?welcome|(?:that's a )?great question)",
    re.IGNORECASE,
)


def early_stopped(dialogues: Sequence[DialogueTurns], ratio: float = 0.9, max_words: int = 12) -> FloatArray:
    """Whether three user turns in a row, anywhere, are near-equal or are all thanks; the mean is ESR (lower is better).

    The paper gives no thresholds; these are `usp_env.endings`'.

    Args:
        dialogues: What each user said, (n,).
        ratio: See `usp_env.endings.is_repetition`.
        max_words: See `usp_env.endings.is_gratitude_loop`.

    Returns:
        0 or 1, (n,): 0 for a dialogue of one or two turns; NaN where the user never spoke.

    Example:
        >>> talks = [DialogueTurns(("soup?", "thanks", "Thanks!", "ok thank you")), DialogueTurns(("soup?",)), DialogueTurns(())]
        >>> early_stopped(talks)
        array([ 1.,  0., nan])
    """

    def flagged(turns: Sequence[str]) -> bool:
        windows = [turns[k : k + WINDOW] for k in range(len(turns) - WINDOW + 1)]
        return any(is_repetition(window, ratio) or is_gratitude_loop(window, max_words) for window in windows)

    return _each(dialogues, lambda turns: float(flagged(turns)))


def user_turns(dialogues: Sequence[DialogueTurns]) -> FloatArray:
    """Number of user turns, (n,); the mean stands beside ESR.

    Example:
        >>> user_turns([DialogueTurns(("hi", "bye")), DialogueTurns(())])
        array([2., 0.])
    """
    return np.array([len(dialogue.turns) for dialogue in dialogues], dtype=np.float64)


def ended_by_user(end_reasons: Sequence[str]) -> FloatArray:
    """Whether the user ended the conversation, by its end token: 0 or 1, (n,); the mean is a share.

    Args:
        end_reasons: Of the episodes (`usp_env.episode`: `info["end_reason"]`, not `info["outcome"]`), (n,).

    Raises:
        UnknownNameError: A value that is no end reason.

    Example:
        >>> ended_by_user(["user_ended", "turn_limit", "repetition"])
        array([1., 0., 0.])
    """
    for reason in end_reasons:
        if reason not in END_REASONS:
            raise UnknownNameError("end reason", reason, END_REASONS)
    return np.array([reason == "user_ended" for reason in end_reasons], dtype=np.float64)


def turn_count_distance(simulated: Sequence[DialogueTurns], real: Sequence[DialogueTurns]) -> float:
    """Wasserstein-1 distance, in turns, of the turn counts of simulated and real users; NaN where either has no dialogue.

    Example:
        >>> turn_count_distance([DialogueTurns(("a",) * 3)], [DialogueTurns(("a",)), DialogueTurns(("a",) * 3)])
        1.0
    """
    return wasserstein(user_turns(simulated), user_turns(real))


class Termination(NamedTuple):
    """How well ends were predicted; each in [0, 1].

    Attributes:
        precision: Of the ends that were predicted, the share that were ends; NaN where none was predicted.
        recall: Of the ends, the share that were predicted; NaN where there was none.
        f1: 2TP / (2TP + FP + FN), UserLM's termination F1; NaN where there was neither.
    """

    precision: float
    recall: float
    f1: float


def termination_counts(predicted: Sequence[Sequence[bool]], actual: Sequence[Sequence[bool]]) -> npt.NDArray[np.int64]:
    """True positives, false positives and false negatives of each dialogue, (n, 3).

    One decision falls after each assistant turn of a real dialogue: does the user end here? Resample the rows over people for a
    confidence interval of `termination`.

    Args:
        predicted: Whether the simulated user would end there, for each dialogue.
        actual: Whether the person did: False but for the last, unless the dialogue was cut.

    Example:
        >>> termination_counts([[False, True, True]], [[False, False, True]])
        array([[1, 1, 0]])
    """
    if [*map(len, predicted)] != [*map(len, actual)]:
        raise SpecError("expected as many predictions as actual decisions for each dialogue")
    rows = [(np.asarray(p, dtype=bool), np.asarray(a, dtype=bool)) for p, a in zip(predicted, actual, strict=True)]
    return np.array([[(p & a).sum(), (p & ~a).sum(), (~p & a).sum()] for p, a in rows], dtype=np.int64).reshape(-1, 3)


def termination(counts: npt.NDArray[np.int64]) -> Termination:
    """Precision, recall and F1 of all decisions together (micro-averaged).

    Example:
        >>> termination(np.array([[1, 1, 0], [0, 0, 1]]))
        Termination(precision=0.5, recall=0.5, f1=0.5)
    """
    hits, alarms, missed = (int(k) for k in np.asarray(counts).reshape(-1, 3).sum(axis=0))

    def share(part: int, whole: int) -> float:
        return part / whole if whole else float("nan")

    return Termination(share(hits, hits + alarms), share(hits, hits + missed), share(2 * hits, 2 * hits + alarms + missed))


def copied_from_profile(dialogues: Sequence[DialogueTurns], profiles: Sequence[ProfileText], size: int = NGRAM) -> FloatArray:
    """Share of a user's word 4-grams that stand in its profile: what may be recited rather than said.

    Case and punctuation are ignored, and "I am a cook" is read as the profile's "You are a cook".

    Returns:
        (n,), in [0, 1]; NaN where no turn has four words, or the profile is blank.

    Example:
        >>> talk = DialogueTurns(("I am a cook in Lyon", "thanks"))
        >>> copied_from_profile([talk], [ProfileText("You are a cook in Paris.")]).round(2)
        array([0.67])
    """
    out = []
    for dialogue, profile in zip(dialogues, profiles, strict=True):
        known = set(_grams(profile.prose, size))
        grams = [gram for turn in dialogue.turns for gram in _grams(second_person(turn), size)]
        out.append(_mean([gram in known for gram in grams]) if not profile.blank() else float("nan"))
    return np.array(out, dtype=np.float64)


def copied_from_assistant(dialogues: Sequence[Dialogue], size: int = NGRAM) -> FloatArray:
    """Share of a user's word 4-grams that stand in the assistant's turn just before; turns before any reply are left out.

    Returns:
        (n,), in [0, 1]; NaN where no turn that follows a reply has four words.

    Example:
        >>> said = [("user", "soup?"), ("assistant", "Chop two leeks and boil."), ("user", "chop two leeks and what")]
        >>> copied_from_assistant([Dialogue.of({"role": role, "content": text} for role, text in said)])
        array([0.5])
    """
    out = []
    for dialogue in dialogues:
        hits: list[bool] = []
        known: set[tuple[str, ...]] | None = None
        for message in dialogue:
            if message.role == "assistant":
                known = set(_grams(message.content, size))
            elif known is not None:
                hits += [gram in known for gram in _grams(message.content, size)]
        out.append(_mean(hits))
    return np.array(out, dtype=np.float64)


def leakage(dialogues: Sequence[DialogueTurns], profiles: Sequence[ProfileText], least: int = NGRAM) -> FloatArray:
    """Share of the profile's sentences that the user says word for word within one turn; case and punctuation are ignored.

    Args:
        dialogues: What each user said, (n,).
        profiles: What each was given, (n,).
        least: Words that a sentence must have to count.

    Returns:
        (n,), in [0, 1]; NaN where the user never spoke, or the profile has no such sentence.

    Example:
        >>> talk = DialogueTurns(("well, you are a cook in Lyon!",))
        >>> leakage([talk], [ProfileText("You are a cook in Lyon. You ask how to clean leeks. You sew.")])
        array([0.5])
    """
    out = []
    for dialogue, profile in zip(dialogues, profiles, strict=True):
        said = [f" {' '.join(_tokens(turn))} " for turn in dialogue.turns]
        known = [tokens for tokens in map(_tokens, sentences(profile.prose)) if len(tokens) >= least]
        hits = [any(f" {' '.join(tokens)} " in turn for turn in said) for tokens in known]
        out.append(_mean(hits) if not dialogue.blank() else float("nan"))
    return np.array(out, dtype=np.float64)


def role_drift(
    dialogues: Sequence[DialogueTurns], human: Callable[[Sequence[str]], npt.NDArray[Any]], threshold: float = HUMAN
) -> FloatArray:
    """Share of a user's turns that sound like an assistant; the mean is the role-drift rate (lower is better).

    A turn counts if P(human) is below the threshold, it begins as assistants do (`sounds_like_assistant`), or it bears their
    label. Real users' rate is not 0: read it beside theirs.

    Args:
        dialogues: What each user said, (n,).
        human: Texts to P(human), in [0, 1]; called once for all turns (`usp_env.models.scorers.load("human-v1")`).
        threshold: Of P(human).

    Returns:
        (n,), in [0, 1]; blank turns are left out, NaN where there is no other.

    Example:
        >>> short = lambda texts: np.array([float(len(text) < 40) for text in texts])
        >>> role_drift([DialogueTurns(("hi", "Certainly! Here it is.")), DialogueTurns(())], short)
        array([0.5, nan])
    """
    said = [[turn for turn in dialogue.turns if turn.strip()] for dialogue in dialogues]
    texts = [turn for turns in said for turn in turns]
    p = shares(human(texts), len(texts), "human") if texts else np.zeros(0)
    drifted = (p < threshold) | np.array([sounds_like_assistant(text) for text in texts], dtype=bool)
    ends = np.cumsum([0, *map(len, said)])
    return np.array([_mean(drifted[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)], dtype=np.float64)


def sounds_like_assistant(text: str) -> bool:
    """Whether a text begins with an assistant's formula, or holds a line labelled as one's; "thanks", "ok" and "sure" do not.

    Example:
        >>> [sounds_like_assistant(text) for text in ("Sure! Here is a list:", "sure, go on", "How can I help you?", "ok thanks")]
        [True, False, True, False]
    """
    return bool(_ASSISTANT.match(text.replace("’", "'"))) or speaks_as(text, "assistant")


def _each(dialogues: Sequence[DialogueTurns], value: Callable[[Sequence[str]], float]) -> FloatArray:
    return np.array([float("nan") if d.blank() else value(d.turns) for d in dialogues], dtype=np.float64)


def _mean(hits: Sequence[bool] | npt.NDArray[np.bool_]) -> float:
    return mean_defined(np.asarray(hits, dtype=np.float64))


def _tokens(text: str) -> list[str]:
    return [token.casefold() for token in words(text) if token[0].isalnum()]


def _grams(text: str, size: int) -> list[tuple[str, ...]]:
    tokens = _tokens(text)
    return [tuple(tokens[k : k + size]) for k in range(len(tokens) - size + 1)]
