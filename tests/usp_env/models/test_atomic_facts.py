"""The atomic-fact splitter on sentences of real profiles."""

from __future__ import annotations

import pytest

from usp_env.models.facts import atomic_facts, sentences
from usp_env.profiles import ProfileBank

CASES = {
    # one verb after another, and a list of questions after "want to know"
    "You ask how to debug it, make plain that you mean viewing the value, and wonder whether a pretty printer must be configured. "
    "You then want to know how this works with the MS compiler, where .gdbinit lives on Windows, and finally whether cdb would do.": [
        "You ask how to debug it.",
        "You make plain that you mean viewing the value.",
        "You wonder whether a pretty printer must be configured.",
        "You then want to know how this works with the MS compiler.",
        "You then want to know where .gdbinit lives on Windows.",
        "You then want to know whether cdb would do.",
    ],
    # a clause with a subject of its own
    "You write C++ with Qt on Windows, using VSCode, and English is probably your second language.": [
        "You write C++ with Qt on Windows, using VSCode.",
        "English is probably your second language.",
    ],
    # a subordinate clause keeps its main clause
    "As the equations do not display well in your web browser, you explain that you want them rendered.": [
        "As the equations do not display well in your web browser, you explain that you want them rendered.",
    ],
    # a list of nouns is one request
    "You ask to be taught variables, data types and operators, followed by control structures.": [
        "You ask to be taught variables, data types and operators, followed by control structures.",
    ],
    # commas inside quotations and brackets join nothing
    "You quote 'come here, ask me' (a song, want it or not) and ask who wrote it.": [
        "You quote 'come here, ask me' (a song, want it or not).",
        "You ask who wrote it.",
    ],
    # a list after a colon
    "You then bring exam questions in turn: features of cyber crime, how an FIR is registered, and the kinds of jurisdiction.": [
        "You then bring exam questions in turn: features of cyber crime.",
        "You then bring exam questions in turn: how an FIR is registered.",
        "You then bring exam questions in turn: the kinds of jurisdiction.",
    ],
    # adverbs move with their clause
    "You first ask for the story of the Last Supper, then specify the episode, and later you insist on lightning.": [
        "You first ask for the story of the Last Supper.",
        "You then specify the episode.",
        "Later you insist on lightning.",
    ],
    # one sentence, one fact
    "You are probably a graduate student applying deep learning to medical signals, with seizure classification as your target.": [
        "You are probably a graduate student applying deep learning to medical signals, with seizure classification as your target.",
    ],
}


@pytest.mark.parametrize("prose", CASES, ids=lambda prose: prose[:40])
def test_real_sentences(prose: str) -> None:
    assert atomic_facts(prose) == CASES[prose]


def test_abbreviations_end_no_sentence() -> None:
    assert sentences("You know Dr. Who, e.g. Tom Baker. You watch it.") == ["You know Dr. Who, e.g. Tom Baker.", "You watch it."]


def test_nothing_gives_nothing() -> None:
    assert atomic_facts("") == []
    assert atomic_facts(" \n ") == []


def test_every_profile_splits_and_loses_no_content_word() -> None:
    counts = []
    for profile in ProfileBank.load("sharegpt", "val"):
        facts = atomic_facts(profile.objective)
        counts.append(len(facts))
        assert all(fact.strip(" .") and fact[0] == fact[0].upper() for fact in facts)
        kept = " ".join(facts).casefold()
        lost = [
            word
            for word in profile.objective.casefold().replace(",", " ").split()
            if len(word) > 4 and word.strip(".;:!?'\"()") not in kept
        ]
        assert set(lost) <= {"finally", "lastly", "before", "after", "which", "later", "then,"}, (profile.id, lost)
    assert 4 < sum(counts) / len(counts) < 9


def test_same_prose_same_facts() -> None:
    prose = next(iter(CASES))
    assert atomic_facts(prose) == atomic_facts(prose)


@pytest.mark.parametrize("mark", ["...", "!", ";", "-", "(!)", "…", " . "])
def test_a_line_without_a_word_is_no_fact(mark: str) -> None:
    assert atomic_facts(mark) == []
    assert atomic_facts(f"You like tea.\n{mark}\nYou sew.") == ["You like tea.", "You sew."]
    assert atomic_facts("- -, - -; you like tea.") == ["You like tea."]
