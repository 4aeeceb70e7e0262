"""Atomic facts: a profile's prose, split into statements that can each be true or false of a person.

FActScore (Min et al., EMNLP 2023) asks a language model to do this; profiles are written in one register (second person, present
tense, a subject that stays), so that rules do: split sentences; split a sentence where a conjunct begins with a verb of the same
"You", or with a subject of its own; split a list of questions after its verb. Each part gets its subject back.
"""

from __future__ import annotations

import re

_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|Dr|Mr|Mrs|Ms|Prof|St|No|approx|Inc|Ltd|Jr|Sr)|\b[A-Z](?:\.[A-Z])*)\.$")
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+(?=[\"'(“‘\[]?[A-Z0-9])")
_PROTECTED = re.compile(r"\"[^\"]*\"|“[^”]*”|(?<![^\s(])'[^']*(?:'(?=\w)[^']*)*'(?!\w)|\([^()]*\)|`[^`]*`")
_VERBS = (
    "accept add adjust agree aim allow announce answer appreciate apologise apologize approach argue ask assign assume "
    "attach avoid begin believe bring build call care carry challenge change check choose cite clarify close come command "
    "compare complain compose conclude condense confirm consider continue convert copy correct cover create cut deal decide "
    "declare define demand describe design develop direct discuss dislike doubt drop end enquire enjoy ensure enter expand "
    "expect experiment explain explore express extend feed feel fill find finish fix follow form forward frame get give go "
    "greet handle happen have hear help hit hold hope imagine include indicate inquire insist instruct intend introduce "
    "invent investigate invite keep know lack lay lead learn leave like limit list live look love maintain make manage map "
    "meet mention move name narrow need note notice object offer open order outline own paste pick plan play point pose "
    "prefer prepare present press proceed produce prompt propose provide pursue push put query question quote raise reach "
    "react read receive recall recognise refer refine reject rely remark remember remind repeat rephrase replace reply "
    "report request require rerun research resume retry return review revise rewrite run say see seek select send set share "
    "shift show simplify sketch sound specify spell spend start state steer stop study submit suggest summarise supply "
    "support suspect switch take talk teach tell test thank think translate treat trim try turn type understand use value "
    "verify view visit wait want watch widen wish wonder work worry wrap write are also can do must would will may were "
    "seem were"
).split()
_ADVERB = (
    r"(?:(?:then|also|later|finally|lastly|next|afterwards|first|now|again|once more|at last|in the end|after that|from there|"
    r"at the end|only then|probably|likely|perhaps|maybe|still|even|just|simply|further|eventually|subsequently|and then) ,?\s*)?"
)
_VERB = rf"(?:{'|'.join(sorted(set(_VERBS), key=len, reverse=True))})"
_SUBJECT = r"(?:you|your|he|she|they|there|it is|it was|this|these|English is)"
# A conjunct: after a comma or semicolon (with or without and/but/then), or after a bare " and then ".
_CONJUNCT = re.compile(
    rf"(?:\s*;\s*(?:and |but )?|,\s+(?:and |but |or )?|\s+and (?=then |finally |later |lastly |you |your |want |ask |request )|"
    rf"\s+but (?=you )|\s+before you |\s+after which you )(?={_ADVERB}(?:{_SUBJECT}|{_VERB})\b)",
)
_QUESTION_VERB = re.compile(
    r"\b(?:ask(?: \w+)?|know|wonder|check|enquire|inquire|learn|find out|hear|see|understand|tell|explain(?:ed)?)(?: about)?\s+"
    r"(?=(?:what|how|why|where|when|who|which|whether|if)\b)"
)
_QUESTION = re.compile(
    r"(?:,\s+(?:and |or |then )*(?:finally |lastly |then |also )?|\s+and (?:finally |lastly |then |also )?)"
    r"(?=(?:what|how|why|where|when|who|which|whether|if)\b)"
)
_LEADING_ADVERB = re.compile(rf"^{_ADVERB}".replace(" ,?", ",? ?"), re.IGNORECASE)
_COLON_LIST = re.compile(r"^(?P<head>[^:]*\b(?:ask|bring|pose|put|question|request|want)\b[^:]*): (?P<items>[^:]+)$")
_ITEM = re.compile(r",\s+(?:and |then |and then |and finally |finally )?|\s*;\s*(?:and )?|\s+and finally ")
_SUBORDINATE = re.compile(
    r"(?:as|when|while|if|since|because|although|though|after|before|once|until|unless|given|in case)\b", re.IGNORECASE
)
_WORD = re.compile(r"\w")
MIN_WORDS = 3


def atomic_facts(prose: str) -> list[str]:
    """Split second-person prose into atomic facts, in order.

    Args:
        prose: A paragraph (or several) such as `Profile.objective`.

    Returns:
        Statements that end in a full stop, most of them with the subject "You"; never an empty one.

    Example:
        >>> atomic_facts("You are a cook in Lyon. You ask how to clean leeks, want a soup for 4, and then thank the assistant.")
        ['You are a cook in Lyon.', 'You ask how to clean leeks.', 'You want a soup for 4.', 'You then thank the assistant.']
        >>> atomic_facts("Finally, you want to know what cdb does and where the file lives.")
        ['Finally, you want to know what cdb does.', 'Finally, you want to know where the file lives.']
    """
    return [fact for sentence in sentences(prose) for fact in _split(sentence)]


def sentences(prose: str) -> list[str]:
    """The sentences of prose, in order; abbreviations do not end one.

    Example:
        >>> sentences("You teach, e.g. at St. Mary. You like tea.")
        ['You teach, e.g. at St. Mary.', 'You like tea.']
    """
    parts: list[str] = []
    for line in prose.split("\n"):
        open_part = ""
        for part in _SENTENCE.split(line.strip()):
            open_part = f"{open_part} {part}".strip()
            if not _ABBREVIATION.search(open_part):
                parts.append(open_part)
                open_part = ""
        parts.append(open_part)
    return [part for part in parts if part]


def _split(sentence: str) -> list[str]:
    if not _WORD.search(sentence):  # a line "..." or ";" states nothing
        return []
    masked, kept = _mask(sentence.rstrip(" .!"))
    facts = [q for clause in _clauses(masked) for item in _items(clause) for q in _questions(item)]
    return [_finish(fact) for fact in (_unmask(fact, kept) for fact in facts) if _WORD.search(fact)]


def _mask(text: str) -> tuple[str, list[str]]:
    """Hide quotations and brackets, whose commas join nothing, behind private-use characters."""
    kept: list[str] = []

    def hide(match: re.Match[str]) -> str:
        kept.append(match[0])
        return chr(0xE000 + len(kept) - 1)

    return _PROTECTED.sub(hide, text), kept


def _unmask(text: str, kept: list[str]) -> str:
    for k, original in enumerate(kept):
        text = text.replace(chr(0xE000 + k), original)
    return text


def _clauses(sentence: str) -> list[str]:
    parts = [part for part in _CONJUNCT.split(sentence) if part]
    clauses: list[str] = []
    for part in parts:
        # What is too short to be a statement, and a main clause that an opening "When …," waits for, belong to what comes before.
        waiting = len(clauses) == 1 and (_SUBORDINATE.match(clauses[0]) or not _has_you(clauses[0]))
        if clauses and (len(part.split()) < MIN_WORDS or waiting and not clauses[0].count(", ")):
            clauses[-1] = f"{clauses[-1]}, {part}"
        else:
            clauses.append(part)
    return [clauses[0], *(_with_subject(part) for part in clauses[1:])]


def _has_you(clause: str) -> bool:
    return re.search(r"\b(?:you|your)\b", clause, re.IGNORECASE) is not None


def _with_subject(clause: str) -> str:
    bare = _LEADING_ADVERB.sub("", clause)
    return clause if re.match(rf"{_SUBJECT}\b", bare) else f"You {clause}"


def _items(clause: str) -> list[str]:
    """Split a list after a colon: 'You bring exam questions: a, b and c' is three facts with one head."""
    match = _COLON_LIST.match(clause)
    if match is None:
        return [clause]
    items = [item for item in _ITEM.split(match["items"]) if item.strip()]
    if len(items) < 2 or min(len(item.split()) for item in items) < 2:
        return [clause]
    return [f"{match['head']}: {item}" for item in items]


def _questions(clause: str) -> list[str]:
    verb = _QUESTION_VERB.search(clause)
    if verb is None:
        return [clause]
    head, tail = clause[: verb.end()], clause[verb.end() :]
    parts = [part for part in _QUESTION.split(tail) if part.strip()]
    return [head + part for part in parts] if all(len(p.split()) >= MIN_WORDS for p in parts) else [clause]


def _finish(fact: str) -> str:
    fact = fact.strip(" ,;")
    return f"{fact[:1].upper()}{fact[1:]}" + ("" if fact.endswith((".", "!", "?")) else ".")
