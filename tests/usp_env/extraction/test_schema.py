"""Checks of the extractor's answers, worked out by hand; what is private data; what the prompts show."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from usp_env.dialogue import Dialogue
from usp_env.extraction import pii, prompts, schema
from usp_env.extraction.extractor import own_claims
from usp_env.extraction.schema import Attributes, Claim, MalformedOutputError, Scenario, Trait
from usp_env.profiles import ProfileBank

EMPTY: dict[str, Any] = {key: [] for key in (*schema.FACTS, "language_style")}
NONE = {"score": "Inconclusive"}
TRAITS: dict[str, Any] = dict.fromkeys(schema.TRAITS, NONE)


def test_the_keys_are_the_papers() -> None:
    assert len(schema.FACTS) == 9
    assert sorted(EMPTY) == [
        "age",
        "education",
        "family_relationships",
        "gender",
        "language_style",
        "location",
        "occupation",
        "other_experiences",
        "routines_or_habits",
        "social_relationships",
    ]


def test_facts_lose_what_says_nothing_and_part_with_their_evidence() -> None:
    record = {
        **EMPTY,
        "age": None,
        "gender": ["Not mentioned in the conversation."],
        "location": ["Location: unknown", None, "Likely in Oslo, as evidenced by: asking for trams"],
        "education": ["None", "N/A", "no information about schooling", "...", "Likely"],
        "occupation": ["Likely a nurse; as suggested by night shifts", "Likely shows films shown by a club"] * 2,
        "family_relationships": ["None of the siblings live near"],
    }
    facts = schema.parse_facts(json.dumps(record))
    assert facts["age"] == facts["gender"] == facts["education"] == ()
    assert facts["location"] == (Claim("Likely in Oslo", "asking for trams"),)
    assert facts["occupation"] == (Claim("Likely a nurse", "night shifts"), Claim("Likely shows films shown by a club"))
    assert facts["family_relationships"] == (Claim("None of the siblings live near"),)
    assert list(facts) == [*schema.FACTS, "language_style"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "one JSON object"),
        ('{"age": [', "one JSON object"),
        ("[" * 100_000, "one JSON object"),
        ("[]", "exactly the keys"),
        (json.dumps({k: v for k, v in EMPTY.items() if k != "age"}), "exactly the keys"),
        (json.dumps({**EMPTY, "mood": []}), "exactly the keys"),
        (json.dumps({**EMPTY, "age": "30"}), "'age' must be a list of texts"),
        (json.dumps({**EMPTY, "age": [30]}), "'age' must be a list of texts"),
        (f"```json\n{json.dumps(EMPTY)}\n```", "without a code fence"),
        ("Here it is: " + json.dumps(EMPTY), "nothing else"),
        (json.dumps({**EMPTY, "age": ["\ud800"]}), "lone surrogate"),
    ],
)
def test_malformed_facts(text: str, complaint: str) -> None:
    with pytest.raises(MalformedOutputError, match=complaint):
        schema.parse_facts(text)


def test_a_thinking_models_thoughts_are_not_its_answer() -> None:
    assert schema.parse_facts(f"<think>{{hm}}</think>\n{json.dumps(EMPTY)}") == dict.fromkeys(EMPTY, ())


def test_scenarios_keep_their_order_and_need_a_goal_and_a_request() -> None:
    scenes = [
        {"goals_or_plans": " Bake ", "task_details": ["Ask for yeast", None, "Ask for time"]},
        {"goals_or_plans": "None", "task_details": ["Ask"]},
        {"goals_or_plans": None, "task_details": ["Ask"]},
        {"goals_or_plans": "Rest", "task_details": []},
        {"goals_or_plans": "Eat", "task_details": ["Ask for jam"]},
    ]
    found = schema.parse_scenarios(json.dumps({"scenarios": scenes}))
    assert found == (Scenario("Bake", ("Ask for yeast", "Ask for time")), Scenario("Eat", ("Ask for jam",)))
    for wrong in ([], scenes[1:4], {"goals_or_plans": "Eat"}, ["Eat"], [{"goals_or_plans": 3, "task_details": ["a"]}]):
        with pytest.raises(MalformedOutputError):
            schema.parse_scenarios(json.dumps({"scenarios": wrong}))


def test_only_traits_that_show_are_kept() -> None:
    high = {"score": "High", "conclusion": "The user is a curious person", "reason": "asks for more"}
    nulls = {"score": "Inconclusive", "conclusion": None, "reason": None}
    found = schema.parse_traits(json.dumps({**TRAITS, "Openness": high, "Agreeableness": nulls}))
    assert found == {"Openness": Trait("high", "The user is a curious person", "asks for more")}


@pytest.mark.parametrize(
    "wrong",
    [
        {"Openness": {"score": "Medium", "conclusion": "c", "reason": "r"}},
        {"Openness": {"score": "High"}},
        {"Openness": {"score": "High", "conclusion": "Unknown", "reason": "r"}},
        {"Openness": {"score": "High", "conclusion": "c", "reason": None}},
        {"Openness": {"conclusion": "c", "reason": "r"}},
        {"Openness": {**NONE, "percent": 3}},
        {"Openness": "High"},
        {"Humour": NONE},
    ],
)
def test_malformed_traits(wrong: dict[str, Any]) -> None:
    with pytest.raises(MalformedOutputError):
        schema.parse_traits(json.dumps({**TRAITS, **wrong}))


OF = "You are a baker in a small town who wants to sell more rye bread."
SC = "Your questions are short and in lower case, and you never say hello."


def test_two_paragraphs_in_the_second_person() -> None:
    assert schema.parse_paragraphs(f"\n{OF}\n \n\n{SC}\n") == (OF, SC)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (OF, "two paragraphs"),
        (f"{OF}\n{SC}", "two paragraphs"),
        (f"{OF}\n\n{SC}\n\n{SC}", "two paragraphs"),
        (f"{OF.replace('You are', 'The user is')}\n\n{SC}", "second person"),
        (f"{OF}\n\n{SC} The user is calm.", "second person"),
        (f"I am a baker in a small town who wants to sell you bread.\n\n{SC}", "second person"),
        (f"He is a baker in a town who wants more. You are he.\n\n{SC}", "second person"),
        (f"**Facts** {OF}\n\n{SC}", "plain prose"),
        (f"{OF}\n\n- {SC}", "plain prose"),
        (f"1. {OF}\n\n2. {SC}", "plain prose"),
        (f"{OF}\n\nYou are terse.", "words"),
        (f"{OF}\n\nYou {'talk ' * 300}.", "words"),
    ],
)
def test_malformed_paragraphs(text: str, complaint: str) -> None:
    with pytest.raises(MalformedOutputError, match=complaint):
        schema.parse_paragraphs(text)


def test_nearly_every_profile_that_people_wrote_would_pass() -> None:
    bank = ProfileBank.load("sharegpt")

    def passes(text: str) -> bool:
        try:
            return bool(schema.parse_paragraphs(text))
        except MalformedOutputError:
            return False

    assert sum(passes(str(profile)) for profile in bank) >= 0.995 * len(bank)


def test_attributes_become_the_banks_record_and_the_rewriters_lines() -> None:
    facts = {key: () for key in EMPTY} | {"other_experiences": (Claim("Sails", "boats"),), "language_style": (Claim("Terse"),)}
    traits = {"Openness": Trait("low", "The user is a plain person", "no wish for more")}
    attributes = Attributes(facts, (Scenario("Bake", ("a", "b")),), traits)
    record = attributes.to_json()
    assert record["objective_facts"] == {
        **{key: [] for key in schema.FACTS},
        "other_experiences": ["Sails"],
        "scenarios": [{"goals_or_plans": "Bake", "task_details": ["a", "b"]}],
    }
    assert record["subjective_characteristics"] == {
        "language_style": ["Terse"],
        "big_five": {
            "conscientiousness": "inconclusive",
            "agreeableness": "inconclusive",
            "extraversion": "inconclusive",
            "openness": "low",
            "neuroticism": "inconclusive",
        },
        "evidence": {"openness": "no wish for more"},
    }
    assert attributes.lines() == [
        "other experiences: Sails",
        "language style: Terse",
        "goal: Bake Requests: a; b",
        "personality: The user is a plain person",
    ]


def test_the_json_schemas_are_strict_ones() -> None:
    def walk(node: dict[str, Any]) -> None:
        if node.get("type") == "object":
            assert node["additionalProperties"] is False
            assert node["required"] == list(node["properties"])
            for child in node["properties"].values():
                walk(child)
        if node.get("type") == "array":
            assert node["maxItems"] <= 20  # a small model in a grammar without bounds goes on until it is cut off
            walk(node["items"])
        if node.get("type") == "string" and "enum" not in node:
            assert re.search(node["pattern"], "Likely a cook in Łódź, as evidenced by 'nóż'")
            assert not any(re.search(node["pattern"], text) for text in ("", "a " * 62 + "a", "a" * 41, 'a "b"', "a\nb"))
        for child in node.get("anyOf", ()):
            walk(child)

    for shape in (schema.FACTS_SCHEMA, schema.SCENARIOS_SCHEMA, schema.TRAITS_SCHEMA):
        walk(shape)
        json.dumps(shape)


def test_a_profile_is_an_object_of_two_paragraphs() -> None:
    assert schema.parse_profile(json.dumps({"objective": OF, "subjective": SC})) == (OF, SC)
    for record in ({"objective": OF}, {"objective": OF, "subjective": None}, {"objective": f"{OF}\n\n{SC}", "subjective": SC}):
        with pytest.raises(MalformedOutputError):
            schema.parse_profile(json.dumps(record))
    paragraph = schema.PROFILE_SCHEMA["properties"]["objective"]["pattern"]
    assert re.search(paragraph, OF)
    assert not any(re.search(paragraph, text) for text in ("I cook.", "You cook.", f"{OF}\n\n{SC}", "You " + "a " * 120 + "a"))


TALK = Dialogue.of(
    [
        {"role": "user", "content": "I bake rye bread every single morning. " + "u" * 5000},
        {"role": "assistant", "content": "As a sailor I sleep on a boat all year. " + "a" * 500},
    ]
)


def test_evidence_that_quotes_the_assistant_is_no_evidence() -> None:
    own = Claim("Bakes", "says 'I bake rye bread every single morning'")
    theirs = Claim("Sails", "'I sleep on a boat all year'")
    short = Claim("Sleeps", "sleep on a boat")  # four words: no quotation
    facts, removed = own_claims({"occupation": (own, theirs, short), "age": ()}, TALK)
    assert facts == {"occupation": (own, short), "age": ()}
    assert removed == 1
    echoed = Dialogue.of([*(m.chat() for m in TALK), {"role": "user", "content": "So I sleep on a boat all year too?"}])
    assert own_claims({"occupation": (own, theirs)}, echoed) == ({"occupation": (own, theirs)}, 0)


def test_prompts_show_the_assistant_as_context_only() -> None:
    marked = prompts.facts_messages(TALK)[1]["content"]
    assert f"[Assistant, context only]: {TALK[1].content[:200]}…\n" in marked
    assert f"[User]: {TALK[0].content[:4000]}…\n" in marked
    assert TALK[1].content[:201] not in marked
    for messages in (prompts.traits_messages(TALK), prompts.facts_messages(TALK, 0), prompts.scenarios_messages(TALK, 0)):
        assert "[Assistant" not in messages[1]["content"]
        assert "rye bread" in messages[1]["content"]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to a.b+c@mail.example.org.", "write to [E-MAIL]."),
        ("(ann@example.org)", "([E-MAIL])"),
        ("call +47 22 12 34 56 now", "call [PHONE] now"),
        ("call (212) 555-0142 or 212-555-0142", "call [PHONE] or [PHONE]"),
        ("card 4111 1111 1111 1111, 4111-1111-1111-1111", "card [CARD], [CARD]"),
        ("host 8.8.8.8 and 2001:4860:4860::8888", "host [IP] and [IP]"),
    ],
)
def test_private_data_is_masked(text: str, masked: str) -> None:
    assert pii.mask(text) == masked
    assert pii.kinds(Dialogue.of([{"role": "user", "content": text}]))


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112 fails Luhn",
        "127.0.0.1, 192.168.0.1, 999.1.1.1, 1.2.3.4.5 and ::1",
        "std::vector<a::b> at 12:30:45 on 2023-10-12",
        "order 1234567890, pi 3.14159265358979, 1 000 000",
        "@property def f(x): return x@y",
        "0000 0000 0000 0000",
        "id 100000000000000008 and 400000000000000002",  # both pass Luhn, but are no length of a card
    ],
)
def test_what_is_no_private_data_stays(text: str) -> None:
    assert pii.mask(text) == text


@pytest.mark.parametrize("filler", [" ", ".", "\n"])
def test_an_endless_answer_is_judged_at_once(filler: str) -> None:
    # A server that overlooks max_tokens, or a model that repeats itself: quadratic patterns would take a quarter of an hour.
    long = filler * 200_000 + "x"
    start = time.perf_counter()
    assert not schema.meaningless(long)
    assert schema._claim(long).text == long.strip()
    with pytest.raises(MalformedOutputError):
        schema.parse_paragraphs(f"{long}\n\n{long}")
    said = Dialogue.of([{"role": "user", "content": "a b c d e f " * 10_000}])
    claims = {"age": (Claim("Likely old", "z y x w v u " * 10_000),)}
    assert own_claims(claims, said) == (claims, 0)
    assert time.perf_counter() - start < 5
