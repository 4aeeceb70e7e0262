"""What an extractor's answers must look like, as JSON schemas and as checks; pure functions.

The shapes are the paper's (Wang et al. 2025, Table 1, Figures 12-14): nine scene-consistent attributes and the language style as
lists of hedged phrases with their evidence, scenarios of a goal and its requests, and a score for each of the Big Five.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from usp_env.dialogue import strip_think

FACTS = (
    "gender",
    "age",
    "location",
    "occupation",
    "education",
    "family_relationships",
    "social_relationships",
    "routines_or_habits",
    "other_experiences",
)
STYLE = "language_style"
TRAITS = ("Conscientiousness", "Agreeableness", "Extraversion", "Openness", "Neuroticism")
PROFILE = ("objective", "subjective")
SCORES = ("High", "Low", "Inconclusive")
MIN_WORDS, MAX_WORDS = 10, 250  # of a paragraph; the packaged bank's have 35 to 120

_EVIDENCE = re.compile(r"(?:[,;]\s*)?\b(?:(?:as )?evidenced|as shown|as suggested|as indicated) by\b:?\s*", re.IGNORECASE)
_NOTHING = re.compile(
    r"\W*(?:(?:likely|probably|possibly)\W*)?"
    r"|\s*(?:[a-z_ ]{2,25}:\s*)?(?:none|null|nil|n/?a|unknown|unspecified|unclear|inconclusive|undetermined"
    r"|not (?:explicitly |clearly |directly )?(?:mentioned|specified|provided|stated|applicable|available|clear|known|given)"
    r"|no (?:clear |explicit |direct )?(?:information|evidence|mention|indication|basis)(?: of .{1,40}| (?:on|about) .{1,40})?"
    r"|(?:cannot|can't|could not) be (?:determined|inferred))"
    r"(?:\s+(?:in|from|by|provided|available|given|found)\b.{0,60})?\W*",
    re.IGNORECASE,
)
_YOU = re.compile(r"\byou(?:r|rs|rself)?\b", re.IGNORECASE)
_THEY = re.compile(r"(?:^|[.!?]\s+)(?:The user|This user|The person|This person|I(?:'m| am))\b")
_MARKUP = re.compile(r"^[^\S\n]*(?:[-*•#>]|\d+[.)]\s|\*\*|```)|\*\*|```", re.MULTILINE)


class MalformedOutputError(ValueError):
    """A model's answer has not the shape that was asked for; the message can be shown to the model."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An attribute and what it was inferred from (empty where the model does not tell)."""

    text: str
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the person wants, and what they ask for, one item a request."""

    goal: str
    details: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trait:
    """A trait that shows: `score` is `"high"` or `"low"`."""

    score: str
    conclusion: str
    reason: str


@dataclass(frozen=True, slots=True)
class Attributes:
    """The valid attributes of one person; what was null, meaningless or inconclusive is not there.

    Args:
        facts: By key of `FACTS` and `STYLE`, every key present.
        scenarios: In the order of the conversation; at least one.
        traits: By name of `TRAITS`, only those that are high or low.
    """

    facts: Mapping[str, tuple[Claim, ...]]
    scenarios: tuple[Scenario, ...]
    traits: Mapping[str, Trait] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The bank's `objective_facts` and `subjective_characteristics`."""
        scenarios = [{"goals_or_plans": s.goal, "task_details": list(s.details)} for s in self.scenarios]
        objective = {key: [claim.text for claim in self.facts[key]] for key in FACTS}
        scores = {name.lower(): self.traits[name].score if name in self.traits else "inconclusive" for name in TRAITS}
        subjective = {
            STYLE: [claim.text for claim in self.facts[STYLE]],
            "big_five": scores,
            "evidence": {name.lower(): trait.reason for name, trait in self.traits.items()},
        }
        return {"objective_facts": {**objective, "scenarios": scenarios}, "subjective_characteristics": subjective}

    def lines(self) -> list[str]:
        """One line an attribute, for the rewriter; a scenario is one, since its requests have an order."""
        facts = [f"{key.replace('_', ' ')}: {claim.text}" for key in (*FACTS, STYLE) for claim in self.facts[key]]
        scenes = [f"goal: {s.goal}" + (f" Requests: {'; '.join(s.details)}" if s.details else "") for s in self.scenarios]
        return [*facts, *scenes, *(f"personality: {trait.conclusion}" for trait in self.traits.values())]


def meaningless(text: str | None) -> bool:
    """Whether a value says nothing.

    Example:
        >>> [meaningless(t) for t in (None, "...", "Not mentioned.", "Age: unknown", "Likely", "None of your siblings live near")]
        [True, True, True, True, True, False]
    """
    return text is None or _NOTHING.fullmatch(text) is not None


def parse_facts(text: str) -> dict[str, tuple[Claim, ...]]:
    """Scene-consistent attributes and language style.

    Raises:
        MalformedOutputError: Not one JSON object of exactly the ten keys, or a value that is no list of texts.
    """
    record = _json_object(text, (*FACTS, STYLE))
    return {key: tuple(map(_claim, _texts(record[key], key))) for key in (*FACTS, STYLE)}


def parse_scenarios(text: str) -> tuple[Scenario, ...]:
    """Scene-related attributes.

    Raises:
        MalformedOutputError: Another shape, or no scenario with a goal and a request: every conversation has one.
    """
    record = _json_object(text, ("scenarios",))
    if not isinstance(record["scenarios"], list):
        raise MalformedOutputError("'scenarios' must be a list")
    found = []
    for scene in record["scenarios"]:
        _check_keys(scene, ("goals_or_plans", "task_details"), "a scenario")
        goal = scene["goals_or_plans"]
        if not isinstance(goal, str | None):
            raise MalformedOutputError("'goals_or_plans' must be a text")
        details = tuple(_texts(scene["task_details"], "task_details"))
        if goal is not None and not meaningless(goal) and details:
            found.append(Scenario(goal.strip(), details))
    if not found:
        raise MalformedOutputError("expected at least one scenario with a goal and a request")
    return tuple(found)


def parse_traits(text: str) -> dict[str, Trait]:
    """The traits that are high or low.

    Raises:
        MalformedOutputError: Not exactly the five traits, another score, or a high or low one without its reason.
    """
    record = _json_object(text, TRAITS)
    return {name: trait for name in TRAITS if (trait := _trait(name, record[name])) is not None}


def parse_paragraphs(text: str) -> tuple[str, str]:
    """Objective facts and subjective characteristics of a rewritten profile.

    Raises:
        MalformedOutputError: Not two plain paragraphs in the second person.

    Example:
        >>> parse_paragraphs("You cook for a living.")
        Traceback (most recent call last):
        usp_env.extraction.schema.MalformedOutputError: expected two paragraphs with an empty line between them, got 1
    """
    text = strip_think(text).strip()
    _check_unicode(text)
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(found) != 2:
        raise MalformedOutputError(f"expected two paragraphs with an empty line between them, got {len(found)}")
    if _MARKUP.search(text):
        raise MalformedOutputError("expected plain prose without headings, lists or other markup")
    for paragraph in found:
        if not _YOU.search(re.split(r"(?<=[.!?])\s", paragraph)[0]) or _THEY.search(paragraph):
            raise MalformedOutputError("expected both paragraphs in the second person ('You …', 'Your …')")
        if not MIN_WORDS <= len(paragraph.split()) <= MAX_WORDS:
            raise MalformedOutputError(f"expected paragraphs of {MIN_WORDS} to {MAX_WORDS} words")
    return found[0], found[1]


def parse_profile(text: str) -> tuple[str, str]:
    """The same from a rewriter's answer, one JSON object of the two paragraphs.

    Raises:
        MalformedOutputError: Another shape, or not two plain paragraphs in the second person.
    """
    record = _json_object(text, PROFILE)
    if not all(isinstance(record[key], str) for key in PROFILE):
        raise MalformedOutputError("'objective' and 'subjective' must be texts")
    return parse_paragraphs("\n\n".join(record[key] for key in PROFILE))


def _claim(text: str) -> Claim:
    phrase, *evidence = _EVIDENCE.split(text, maxsplit=1)
    return Claim(phrase.strip(), evidence[0].strip()) if evidence and phrase.strip() else Claim(text.strip())


def _trait(name: str, value: Any) -> Trait | None:
    if not isinstance(value, dict) or not {"score"} <= set(value) <= {"score", "conclusion", "reason"}:
        raise MalformedOutputError(f"{name!r} must be an object with 'score', 'conclusion' and 'reason'")
    if value["score"] not in SCORES:
        raise MalformedOutputError(f"the score of {name!r} must be one of {', '.join(SCORES)}")
    if value["score"] == "Inconclusive":
        return None
    conclusion, reason = (value.get(key) for key in ("conclusion", "reason"))
    if not isinstance(conclusion, str) or not isinstance(reason, str) or meaningless(conclusion) or meaningless(reason):
        raise MalformedOutputError(f"{name!r} is {value['score']}: it needs a conclusion and a reason")
    return Trait(value["score"].lower(), conclusion.strip(), reason.strip())


def _texts(value: Any, key: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str | None) for item in value):
        raise MalformedOutputError(f"{key!r} must be a list of texts")
    return list(dict.fromkeys(item.strip() for item in value if not meaningless(item)))  # small models repeat themselves


def _json_object(text: str, keys: Sequence[str]) -> dict[str, Any]:
    text = strip_think(text).strip()
    if text.startswith("```"):
        raise MalformedOutputError("expected bare JSON, without a code fence")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedOutputError(f"expected one JSON object and nothing else ({error})") from error
    _check_unicode(json.dumps(record, ensure_ascii=False))
    _check_keys(record, keys, "the answer")
    return record  # type: ignore[no-any-return]


def _check_keys(record: Any, keys: Sequence[str], what: str) -> None:
    if not isinstance(record, dict) or set(record) != set(keys):
        raise MalformedOutputError(f"{what} must be an object with exactly the keys {', '.join(keys)}")


def _check_unicode(text: str) -> None:
    if re.search("[\ud800-\udfff]", text):
        raise MalformedOutputError("expected valid Unicode, got a lone surrogate")


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(properties), "additionalProperties": False}


# Bounds, so that no model goes on for ever inside a grammar that lets it. Of the keywords for texts OpenAI's strict mode knows
# `pattern`, not `maxLength`; xgrammar counts to 128; quotation marks and backslashes are out since engines match escaped text.
_WORD = r'[^" \\\n\r\t]{1,40}'
_TEXT = {"type": "string", "pattern": rf"^{_WORD}( {_WORD}){{0,60}}$"}
_PHRASES = {"type": "array", "items": _TEXT, "maxItems": 6}
_REQUESTS = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 20}
_TEXT_OR_NULL = {"anyOf": [_TEXT, {"type": "null"}]}
FACTS_SCHEMA = _object(dict.fromkeys((*FACTS, STYLE), _PHRASES))
_SCENARIO = _object({"goals_or_plans": _TEXT, "task_details": _REQUESTS})
SCENARIOS_SCHEMA = _object({"scenarios": {"type": "array", "items": _SCENARIO, "minItems": 1, "maxItems": 3}})
_SCORED = _object({"score": {"type": "string", "enum": list(SCORES)}, "conclusion": _TEXT_OR_NULL, "reason": _TEXT_OR_NULL})
TRAITS_SCHEMA = _object(dict.fromkeys(TRAITS, _SCORED))
_PARAGRAPH = {"type": "string", "pattern": rf"^Your?( {_WORD}){{9,120}}$"}
PROFILE_SCHEMA = _object(dict.fromkeys(PROFILE, _PARAGRAPH))
