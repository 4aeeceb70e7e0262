"""SC.Score and Val.Score: a judge's 1 to 5 for subjective characteristics (paper §5.3, Table 2 and App. D).

Val.Score: is the description of a person's manner and traits borne out by the dialogue it was read from? SC.Score: does a
simulated user behave as the description it was given says? There the paper's guidelines hold: traits may be inferred from the
context and need not be said, short turns are not held against a user, reasons are to be brief, and a user that does not sound
like a person scores lower even where it fits. Prompts in our words: the paper's own are not public; its tables' values lie in
1 to 5.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.metrics.judges import Judge, Question, Verdict, cut, scored, transcript
from usp_env.profiles import Profile

LOW, HIGH = 1, 5

SC = """Above are a description of how a person writes and which traits they show, and a conversation, one JSON object a line, \
in which a USER was to be that person. Rate from 1 to 5 how well the USER's turns fit the description.
- Infer from context: a trait need not be named; it shows in what is asked for, how, and how the user goes on.
- Judge only what the turns give occasion to show; what a few short turns leave open counts neither for nor against.
- A user who does not sound like a human being (recites the description, is polished like an assistant, talks as one) gets a \
lower score even where the content fits.
1: contradicts it; 2: mostly unlike it; 3: neither like nor unlike it, or alike but hardly human; 4: like it, with small \
departures; 5: like it throughout, and human.
Answer in the form {"score": <number from 1 to 5>, "reason": "<one or two sentences>"}."""

VAL = """Above are a description of how a person writes and which traits they show, and the conversation, one JSON object a \
line, that it was inferred from. Rate from 1 to 5 how valid the description is for the USER.
- Look only at what the USER wrote; the assistant's turns are there to be understood from.
- A trait is valid if the user's words or habits reasonably suggest it; it need not be stated.
- What nothing in the conversation suggests, what it contradicts, and praise that would fit anybody lower the score.
1: mostly wrong; 2: more wrong than right; 3: right in part, or too general to be wrong; 4: right, with small faults; 5: right \
throughout, and telling.
Answer in the form {"score": <number from 1 to 5>, "reason": "<one or two sentences>"}."""


def sc_score(judge: Judge, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[Verdict]:
    """SC.Score: does each simulated user show the subjective characteristics that it was given (Tables 3 and 4)?

    Args:
        judge: See `usp_env.metrics.judges.Judge`.
        profiles: The given profiles, (n,); the second paragraph counts.
        dialogues: The simulated dialogues, (n,); both sides are shown.

    Returns:
        One verdict per dialogue, from 1 to 5; not asked, and NaN, where the user said nothing or the paragraph is blank.

    Example:
        >>> from usp_env.backends.scripted import ScriptedBackend
        >>> judge = Judge(ScriptedBackend(['{"score": 4, "reason": "Terse, as described."}']))
        >>> talk = Dialogue.of([{"role": "user", "content": "soup. for 4."}])
        >>> sc_score(judge, [Profile("a", "You cook.", "You are terse.")], [talk])[0].value
        4.0
    """
    return judge.ask(_questions(SC, profiles, dialogues))


def val_score(judge: Judge, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[Verdict]:
    """Val.Score: is each profile's second paragraph valid for the user of the real dialogue it was read from (Table 2)?

    Args:
        judge: See `usp_env.metrics.judges.Judge`.
        profiles: What was read from the dialogues, (n,).
        dialogues: The real dialogues, (n,).

    Returns:
        One verdict per dialogue, from 1 to 5; not asked, and NaN, where the user said nothing or the paragraph is blank.
    """
    return judge.ask(_questions(VAL, profiles, dialogues))


def _questions(guidelines: str, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[Question | None]:
    if len(profiles) != len(dialogues):
        raise SpecError(f"expected one profile for each dialogue, got {len(profiles)} profiles and {len(dialogues)} dialogues")
    return [_question(guidelines, profile, dialogue) for profile, dialogue in zip(profiles, dialogues, strict=True)]


def _question(guidelines: str, profile: Profile, dialogue: Dialogue) -> Question | None:
    if not profile.subjective.strip() or not "".join(dialogue.utterances("user")).strip():
        return None
    shown = json.dumps({"description": cut(profile.subjective)}, ensure_ascii=False)
    return scored(f"{shown}\n{transcript(dialogue)}\n---\n{guidelines}", LOW, HIGH)
