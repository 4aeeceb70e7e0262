"""Which judge may be trusted: a gate before it judges, and its agreement with people after.

PersonaEval (2025) found that models which cannot tell who is speaking (69 % right; people 91 %) are used to judge role-play. So a
judge must first say of excerpts with hidden speakers whether the user or the assistant wrote the last message, and rate a few
conversations whose quality is beyond doubt. Below the gate it is refused with a `JudgeRefusedError`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from usp_env.dialogue import Dialogue, Message, Role
from usp_env.errors import SpecError, UspError
from usp_env.metrics.agreement import cohen_kappa
from usp_env.metrics.judges import Judge, Verdict, chosen, cut
from usp_env.metrics.judging import rate
from usp_env.records import check_seed

GATE = 0.8
"""Share that must be right, of speakers and of anchors each: our choice, between the models and the people of PersonaEval."""
MIN_CASES = 10
WINDOW = 3
"""Most messages of an excerpt."""
MIN_WORDS = 3

SPEAKER = """Above is an excerpt of a conversation between a human user and an AI assistant, one JSON object a line; X and Y are \
the two speakers, in no particular order. Who wrote the LAST message?
Answer in the form {"speaker": "user" or "assistant", "reason": "<one sentence>"}."""


class JudgeRefusedError(UspError, ValueError):
    """A judge did worse than the gate on speakers or on anchors; nothing that it says should be reported."""


class SpeakerCase(NamedTuple):
    """An excerpt whose last speaker is to be told; `role` is the truth."""

    messages: tuple[Message, ...]
    role: Role


class Anchor(NamedTuple):
    """A conversation with the range, on 1 to 10, in which any fair rating of its assistant lies."""

    dialogue: Dialogue
    low: float
    high: float


def _talk(*lines: str) -> Dialogue:
    roles: tuple[Role, Role] = ("user", "assistant")
    return Dialogue(tuple(Message(roles[k % 2], line) for k, line in enumerate(lines)))


ANCHORS = (
    Anchor(
        _talk(
            "what's the capital of australia and is it bigger than sydney?",
            "Canberra. It is much smaller: about 0.47 million people, against more than 5 million in Sydney.",
            "ok and why isnt it sydney",
            "Sydney and Melbourne both wanted it, so the constitution of 1901 asked for a new city in New South Wales, at least "
            "100 miles from Sydney. The site of Canberra was chosen in 1908.",
        ),
        7,
        10,
    ),
    Anchor(
        _talk(
            "Write a Python function that returns the even numbers of a list.",
            "def evens(numbers):\n    return [n for n in numbers if n % 2 == 0]\n\nevens([1, 2, 4]) gives [2, 4].",
        ),
        7,
        10,
    ),
    Anchor(
        _talk(
            "Translate 'good morning, my friend' into Spanish and French.",
            "Spanish: Buenos días, amigo mío (amiga mía to a woman).\nFrench: Bonjour, mon ami (mon amie to a woman).",
        ),
        7,
        10,
    ),
    Anchor(_talk("what's 17 * 6?", "what's 17 * 6?", "no, tell me the result", "no, tell me the result"), 1, 3),
    Anchor(
        _talk(
            "how do i get red wine out of a white shirt?", "The stock market has had ups and downs throughout its long history."
        ),
        1,
        3,
    ),
    Anchor(_talk("Name three rivers in Germany.", "The three are the Nile, the Amazon and the Mississippi."), 1, 3),
)
"""The packaged calibration set: three conversations that are answered well, three that are echoed, evaded or wrong."""


class GateReport(NamedTuple):
    """How a judge passed.

    Attributes:
        speakers: Share of speakers told right, in [0, 1].
        anchors: Share of anchors rated within their range; NaN without anchors.
        n_speakers: Number of cases.
        n_anchors: Number of anchors.
    """

    speakers: float
    anchors: float
    n_speakers: int
    n_anchors: int


def speaker_cases(dialogues: Sequence[Dialogue], seed: int = 0) -> list[SpeakerCase]:
    """One excerpt per dialogue, whose last message is by turns the user's and the assistant's.

    A judge that always says the same is right in half of them. Dialogues without a message of three words by the role whose turn
    it is are passed over.

    Example:
        >>> talk = Dialogue.of([{"role": "user", "content": "hi how are u"}, {"role": "assistant", "content": "I am very well."}])
        >>> [(case.role, len(case.messages)) for case in speaker_cases([talk, talk])]
        [('user', 1), ('assistant', 2)]
    """
    rng = np.random.default_rng(check_seed(seed))
    cases: list[SpeakerCase] = []
    for dialogue in dialogues:
        role: Role = "assistant" if len(cases) % 2 else "user"
        places = [k for k, m in enumerate(dialogue) if m.role == role and len(m.content.split()) >= MIN_WORDS]
        if places:
            end = places[rng.integers(len(places))] + 1
            cases.append(SpeakerCase(dialogue.messages[max(0, end - WINDOW) : end], role))
    return cases


def identify(judge: Judge, cases: Sequence[SpeakerCase]) -> list[Verdict]:
    """Who wrote the last message of each case: verdicts of value 1 (user) or 0 (assistant)."""
    return judge.ask([chosen(f"{_hidden(case)}\n---\n{SPEAKER}", "speaker", {"user": 1.0, "assistant": 0.0}) for case in cases])


def admit(judge: Judge, cases: Sequence[SpeakerCase], anchors: Sequence[Anchor] = ANCHORS, gate: float = GATE) -> GateReport:
    """Let a judge pass the gate, or refuse it.

    An answer that cannot be read counts as wrong.

    Args:
        judge: The judge.
        cases: At least 10, of `speaker_cases`.
        anchors: The calibration set; `()` leaves it out.
        gate: Share that must be right of each kind, in [0, 1].

    Raises:
        JudgeRefusedError: It did worse.
        BackendError: A call failed, so that nothing is known of the judge.
        SpecError: Too few cases to tell, or a gate outside of [0, 1].
    """
    if len(cases) < MIN_CASES or not 0 <= gate <= 1:
        raise SpecError(f"expected at least {MIN_CASES} cases and a gate in [0, 1], got {len(cases)} cases and gate {gate}")
    told = _answered(identify(judge, cases))
    speakers = float(np.mean([verdict.value == (case.role == "user") for verdict, case in zip(told, cases, strict=True)]))
    rated = _answered(rate(judge, [anchor.dialogue for anchor in anchors]))
    inside = [anchor.low <= verdict.value <= anchor.high for verdict, anchor in zip(rated, anchors, strict=True)]
    report = GateReport(speakers, float(np.mean(inside)) if inside else float("nan"), len(cases), len(anchors))
    if speakers < gate or report.anchors < gate:
        raise JudgeRefusedError(
            f"judge {judge.name!r}: expected at least {gate:.0%} right, got {speakers:.0%} of {len(cases)} speakers and "
            f"{report.anchors:.0%} of {len(anchors)} anchor conversations: use a stronger judge"
        )
    return report


def kappa_with_humans(
    judge: Sequence[float], human: Sequence[float], weights: Literal["linear", "quadratic"] | None = None
) -> float:
    """Cohen's kappa of a judge's labels and a person's, over the cases that both have labelled (`agreement.cohen_kappa`).

    Args:
        judge: Labels, (n,): outcomes of comparisons, or whole-number scores; NaN where the judge gave none.
        human: Labels of the same cases, (n,); NaN where the person gave none.
        weights: None for outcomes; `"quadratic"` for scores, whose distance counts.

    Returns:
        In [−1, 1], 0 is chance; NaN where no case is left, or both gave one and the same label to all.

    Raises:
        SpecError: Different lengths, or scores that are no whole numbers.
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> kappa_with_humans([1, 1, -1, -1, float("nan")], [1, 1, -1, 1, 1])
        0.5
    """
    a, b = np.asarray(judge, dtype=np.float64), np.asarray(human, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise SpecError(f"expected two lists of labels of one length, got {a.shape} and {b.shape}")
    kept = ~np.isnan(a + b)
    a, b = a[kept], b[kept]
    if np.any(a % 1) or np.any(b % 1):
        raise SpecError("expected labels or whole-number scores: round the scores first")
    if not a.size:
        return float("nan")
    x, y = a.astype(int).tolist(), b.astype(int).tolist()
    scale = range(min(x + y), max(x + y) + 1)  # with the scores that nobody gave: 1 and 9 are 8 apart, not one
    return cohen_kappa(x, y, weights, scale if weights else None)


def _answered(verdicts: Sequence[Verdict]) -> Sequence[Verdict]:
    for verdict in verdicts:
        if verdict.error is not None:
            raise verdict.error
    return verdicts


def _hidden(case: SpeakerCase) -> str:
    first = case.messages[0].role
    return "\n".join(
        json.dumps({"speaker": "X" if message.role == first else "Y", "text": cut(message.content)}, ensure_ascii=False)
        for message in case.messages
    )
