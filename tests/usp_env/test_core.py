"""Profiles, banks, dialogues, spaces, endings, errors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usp_env.dialogue import END, Act, Dialogue, Message, split_end, strip_think
from usp_env.endings import is_gratitude_loop, is_repetition, similar, speaks_as
from usp_env.errors import MissingAssetError, MissingExtraError, ProfileFormatError, SpecError, UnknownNameError, require
from usp_env.profiles import PACKAGED, Profile, ProfileBank, combine, reserved_ids
from usp_env.spaces import Messages, Utterance

GOOD = {"id": "a", "profile": {"objective": "You cook.", "subjective": "You are terse."}}


def test_the_packaged_bank() -> None:
    bank = ProfileBank.load("sharegpt")
    assert len(bank) == 1791
    assert {s: len(bank.subset(s)) for s in ("train", "val", "test")} == {"train": 1537, "val": 102, "test": 152}
    assert all("you" in profile.objective.casefold() for profile in bank)  # second person
    assert len(reserved_ids()) == 180
    assert not reserved_ids() & {profile.id for profile in bank}
    assert sum(bool(profile.task_details) for profile in bank) == 1791


def test_reserved_profiles_are_left_out_with_a_warning(tmp_path: object) -> None:
    file = tmp_path / "bank.jsonl"
    reserved = {**GOOD, "id": min(reserved_ids())}
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(reserved) + "\n", "utf-8")
    with pytest.warns(UserWarning, match="1 reserved"):
        bank = ProfileBank.load(file)
    assert [profile.id for profile in bank] == ["a"]


def test_round_trip_keeps_odd_characters(tmp_path: object) -> None:
    odd = Profile(
        "a\u2028b", "You write\u2028lines\x85 and 你好 🙂.", "Terse.\n\nTwo paragraphs.", split="val", user_id="u1", silver="g-1"
    )
    ProfileBank([odd]).save(tmp_path / "x.jsonl")
    assert ProfileBank.load(tmp_path / "x.jsonl")[0] == Profile(**{**{f: getattr(odd, f) for f in odd.__slots__}, "source": "x"})


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "(line)"),
        ("[]", "(line)"),
        (json.dumps({**GOOD, "id": ""}), "id"),
        (json.dumps({"id": "a"}), "profile"),
        (json.dumps({"id": "a", "profile": {"objective": "x"}}), "profile.subjective"),
        (json.dumps({"id": "a", "profile": {"objective": " ", "subjective": "x"}}), "profile.objective"),
        (json.dumps({"id": "a", "profile": {"objective": "\ud800", "subjective": "x"}}), "profile.objective"),
        (json.dumps({**GOOD, "split": "dev"}), "split"),
        (json.dumps({**GOOD, "user_id": 3}), "user_id"),
        (json.dumps({**GOOD, "silver": True}), "silver"),
        (json.dumps({**GOOD, "objective_facts": []}), "objective_facts"),
        (json.dumps({**GOOD, "conversation": {}}), "conversation"),
        (json.dumps({**GOOD, "id": "\ud800"}), "(line)"),
        (json.dumps({**GOOD, "objective_facts": {"scenarios": [1]}}), "objective_facts.scenarios"),
        (json.dumps({**GOOD, "objective_facts": {"scenarios": [{"task_details": "x"}]}}), "objective_facts.scenarios"),
        ("[" * 100_000, "(line)"),
    ],
)
def test_a_bad_line_names_file_line_and_field(tmp_path: object, line: str, field: str) -> None:
    file = tmp_path / "bank.jsonl"
    file.write_text(json.dumps({**GOOD, "id": "first"}) + "\n" + line + "\n", "utf-8")
    with pytest.raises(ProfileFormatError) as caught:
        ProfileBank.load(file)
    assert "bank.jsonl, line 2" in str(caught.value)
    assert f"'{field}'" in str(caught.value)


def test_bad_banks(tmp_path: object) -> None:
    with pytest.raises(ProfileFormatError, match="more than once"):
        ProfileBank([Profile("a", "x", "y"), Profile("a", "x", "y")])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ProfileFormatError, match="at least one"):
        ProfileBank.load(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\xff\n")
    with pytest.raises(ProfileFormatError, match="save the file as UTF-8"):
        ProfileBank.load(tmp_path / "latin.jsonl")
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(ProfileBank.load(tmp_path / "windows.jsonl")) == 1
    for name in ("nowhere", "lmsys-usp"):
        with pytest.raises(MissingAssetError):
            ProfileBank.load(name)
    with pytest.raises(UnknownNameError, match="did you mean 'test'"):
        ProfileBank.load("sharegpt", "tests")


def test_virtual_profiles_name_their_donors() -> None:
    bank = ProfileBank([Profile("a+b", "You cook.", "Terse.", {"objective_facts": {"scenarios": [{"task_details": ["soup"]}]}}),
                        Profile("c", "You sew.", "Chatty.")])  # fmt: skip
    joined = combine(bank[0], bank[1])
    assert (joined.id, joined.objective, joined.subjective) == ("virtual:a+b+c", "You cook.", "Chatty.")
    assert joined.task_details == ("soup",)
    assert bank.get("virtual:a+b+c") == joined
    assert bank.get("virtual:c+a+b").objective == "You sew."
    with pytest.raises(UnknownNameError):
        bank.get("virtual:a+c")


def test_dialogue_and_views() -> None:
    dialogue = Dialogue.of([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}])
    longer = dialogue.add(Message("user", "soup"))
    assert (dialogue.turns, longer.turns, len(dialogue)) == (1, 2, 2)
    profile = Profile("a", "x", "y")
    assert longer.view_for("assistant", profile).profile is None
    assert longer.view_for("user", profile).profile is profile
    for bad in ({"role": "system", "content": "x"}, {"role": "user"}, {"role": "user", "content": 3}):
        with pytest.raises(SpecError):
            Dialogue.of([bad])


def test_think_and_end() -> None:
    assert strip_think("a<think>b</think> c<think>d") == "ac"
    assert split_end(f"bye {END}\n") == ("bye", True)
    assert split_end(f"{END} is a marker") == (f"{END} is a marker", False)


@given(st.text(), st.text())
def test_act_is_its_text(a: str, b: str) -> None:
    assert (Act(a) == a, Act(a) + b) == (True, a + b)


def test_similar_is_difflibs_ratio() -> None:
    # "abcd" and "bcde" share 3 of 4 characters: 2·3/8 = .75
    assert similar("abcd", "bcde", 0.75)
    assert not similar("abcd", "bcde", 0.76)
    assert similar("ABC", "abc", 1.0)


def test_loops() -> None:
    assert not is_repetition(["a b", "a b"])
    assert is_repetition(["x", "same text here", "Same text here", "same text here!"])
    assert not is_repetition(["same text here", "something else", "same text here"])
    assert is_gratitude_loop(["thanks", "ty", "I appreciate it"])
    assert not is_gratitude_loop(["thanks", "party", "thanks"])  # "ty" is a word, not a syllable
    assert not is_gratitude_loop(["thanks", "thanks " * 13, "thanks"])


@pytest.mark.parametrize("text", ["Assistant: hi", "[Assistant]: hi", "ok\n\n**ChatGPT**: sure", "AI assistant : x"])
def test_speaks_as_the_assistant(text: str) -> None:
    assert speaks_as(text, "assistant")


@pytest.mark.parametrize("text", ["What is an assistant: a person?", "you are my assistant", "User: hi"])
def test_does_not_speak_as_the_assistant(text: str) -> None:
    assert not speaks_as(text, "assistant")


def test_spaces() -> None:
    space = Utterance(10, seed=0)
    assert all(space.contains(space.sample()) for _ in range(50))
    assert [space.contains(x) for x in ("naïve 你", "", " ", "x" * 11, "\ud800", 3)] == [True, *[False] * 5]
    assert space == Utterance(10) != Utterance(11)
    talk = Messages(seed=0)
    assert talk.contains(())
    assert all(talk.contains(talk.sample()) for _ in range(20))
    assert not talk.contains(({"role": "narrator", "content": "x"},))
    sample = talk.sample()
    assert talk.from_jsonable(talk.to_jsonable([sample])) == [sample]


def test_require_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'usp-env\[hf\]'"):
        require("no_such_module_here", "hf")


def test_a_thousand_ends_of_thought_are_one() -> None:
    assert strip_think("</think>" * 5000 + " Paris.") == "Paris."


def test_the_silver_bank_is_marked_and_shares_nobody_with_the_gold_one() -> None:
    silver, gold = ProfileBank.load("sharegpt-silver"), ProfileBank.load("sharegpt")
    assert {profile.split for profile in silver} == {"train"}
    assert {profile.silver for profile in silver} == {"profile-generator-81d4b2802cbd"}
    assert {profile.silver for profile in gold} == {None}

    def people(ids: Iterable[str]) -> set[str]:  # the segments of a conversation are one person's
        return {id.rpartition("_")[0] for id in ids}

    assert not people(p.id for p in silver) & people([*(p.id for p in gold), *reserved_ids()])
    lines = (resources.files("usp_env.data") / PACKAGED["sharegpt-silver"]).read_text("utf-8").splitlines()
    assert len(lines) == len(silver)  # no reserved one was left out
    assert all(p.objective.startswith("You") and len(p.subjective) > 20 for p in silver)
