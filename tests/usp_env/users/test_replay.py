"""Replay: whose turns, in which order, and the end."""

from __future__ import annotations

import pytest

from usp_env.dialogue import Dialogue, Message
from usp_env.errors import SpecError, UnknownNameError
from usp_env.profiles import Profile, ProfileBank, combine
from usp_env.users.replay import Nearest, ReplaySpeaker, user_turns


def person(name: str, facts: str, *turns: str) -> Profile:
    said = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    said += [{"role": r, "content": c} for turn in turns for r, c in (("user", turn), ("assistant", "ok"))]
    return Profile(name, facts, "You are terse.", {"conversation": said} if turns else None)


BAKER = person("b+1", "You bake rye bread at home.", "bread?", " ", "how hot?")
CODER = person("c", "You debug Python at work.", "traceback", "why?")
MUTE = person("m", "You bake rye bread at work.")
BANK = ProfileBank([CODER, BAKER, MUTE], "three")


def said(profile: Profile, turns: int) -> list[tuple[str, bool]]:
    user, dialogue, found = ReplaySpeaker(BANK), Dialogue(), []
    for _ in range(turns):
        reply = user.respond([dialogue.view_for("user", profile)], [0])[0]
        found.append((reply.text, reply.ended))
        dialogue = dialogue.add(Message("user", reply.text)).add(Message("assistant", "whatever"))
    return found


def test_a_profile_says_its_own_turns_in_order_and_ends() -> None:
    assert said(CODER, 3) == [("traceback", False), ("why?", False), ("", True)]
    assert said(BAKER, 3) == [("bread?", False), ("how hot?", False), ("", True)]


def test_a_virtual_profile_says_those_of_its_of_donor() -> None:
    assert said(combine(BAKER, CODER), 1) == [("bread?", False)]
    assert said(combine(CODER, BAKER), 1) == [("traceback", False)]
    assert ReplaySpeaker(BANK).donor(Profile("virtual:b+1+elsewhere", "You debug Python.", "x")) == "b+1"  # by id, not by words


@pytest.mark.parametrize(
    ("facts", "donor"),
    [
        ("You bake bread.", "b+1"),
        ("You write Python.", "c"),
        ("Du kochst Suppe.", "c"),  # no word in common: the first
    ],
)
def test_anyone_else_says_those_of_the_nearest(facts: str, donor: str) -> None:
    assert ReplaySpeaker(BANK).donor(Profile("new", facts, "x")) == donor


def test_who_has_no_conversation_is_nobody_s_donor() -> None:
    assert ReplaySpeaker(BANK).donor(MUTE) == "b+1"
    assert ReplaySpeaker(BANK).donor(combine(MUTE, CODER)) == "b+1"


def test_rare_words_count_most() -> None:
    # df: the 3, a 2, b 1, c 1 → idf: 1, ln 1.5 + 1 = 1.405, ln 3 + 1 = 2.099. Scores of "the a b":
    # x = (1 + 1.405²)/|x| with |x| = √(1 + 1.405²) = 1.725 → 1.725; y: (1 + 2.099²)/√(1 + 2.099² + 1.405²)…
    nearest = Nearest({"x": "the a", "y": "the b", "z": "the a c"})
    assert nearest("the a b") == "y"  # 1.725 against (1 + 4.404)/2.325 = 2.325 and (1 + 1.975)/2.717 = 1.095
    assert nearest("THE a!") == "x"
    assert Nearest({"long": "a b c d", "short": "a"})("a") == "short"


def test_a_bank_without_conversations_is_refused() -> None:
    with pytest.raises(SpecError, match="none of the 1 profiles of bank 'quiet'"):
        ReplaySpeaker(ProfileBank([MUTE], "quiet"))
    with pytest.raises(SpecError, match="ships without"):
        ReplaySpeaker.load("sharegpt")
    with pytest.raises((SpecError, UnknownNameError, FileNotFoundError), match="nowhere"):
        ReplaySpeaker.load("nowhere.jsonl")


def test_only_spoken_user_turns_are_replayed() -> None:
    odd = Profile(
        "o", "You.", "x", {"conversation": [{"role": "user"}, {"role": "user", "content": "hi"}, "text", {"role": "tool"}]}
    )
    assert user_turns(odd) == ["hi"]
    assert user_turns(MUTE) == []
