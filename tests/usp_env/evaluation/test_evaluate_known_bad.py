"""Users that are bad in a known way, on the packaged scorers: the metric that should catch each of them does, and spares a good one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_doubles import candidate, echo, make_plan, talk

from usp_env.dialogue import View
from usp_env.evaluation import scorers
from usp_env.evaluation.card import REAL, Card
from usp_env.evaluation.people import Person, person
from usp_env.evaluation.run import evaluate
from usp_env.models.facts import sentences
from usp_env.profiles import Profile
from usp_env.records import Reply

pytestmark = pytest.mark.assets

# What each person is, how they write, what they say in turn, and what they say when they are no longer themselves.
PEOPLE = {
    "cook": (
        "You run a small soup kitchen in Lyon and plan the menu for next week. You ask how to clean leeks, how to thicken a potato "
        "soup without cream, and how much stock 40 guests need. You want a shopping list and a vegan version of the menu.",
        "You write short lowercase messages without punctuation and you are practical.",
        ["how do i clean leeks fast", "and whats the best way to thicken a potato soup without cream", "ok how much stock for 40 guests",
         "can u make a shopping list for the soups", "now a vegan version of the menu pls", "which soup keeps best till the next day",
         "thx that helps a lot with the menu"],
    ),
    "coder": (
        "You are learning Go and write a small web server. You ask how to sort a slice of structs, how to read JSON from a request, "
        "and why a goroutine leaks. You want tests for your HTTP handlers and help with a Dockerfile.",
        "You write tersely, paste errors and do not say please.",
        ["how to sort a slice of structs in go", "read json from a request body in go", "why does my goroutine leak when the client goes away",
         "write a test for the http handler", "dockerfile for the go server", "how do i make the docker image smaller",
         "ok and graceful shutdown of the http server?"],
    ),
    "teacher": (
        "You teach history to 14-year-olds and prepare a lesson on the French Revolution. You ask for a timeline, for quiz questions "
        "about the Bastille, and for a debate on Robespierre. You want homework that takes 20 minutes.",
        "You are friendly and a little hurried, and you make typos.",
        ["can you give me a timeline of the french revolution for 14 yr olds", "nice. now some quiz questions on the bastille",
         "make them a bit harder pls", "i want the class to debate robespierre, any ideas how to set that up",
         "ok homework next, shouldnt take more than 20 min", "and a short text on marie antoinette they can read",
         "great, can you put the whole lesson on one page"],
    ),
    "traveller": (
        "You travel to Phuket with two children in July and look for quiet beaches. You ask about the weather, boat trips to Phi Phi, "
        "and hotels with a kitchen. You want a plan for five days and worry about sea sickness.",
        "You write in full sentences, you worry a lot and you ask again when something is unclear.",
        ["We want to go to Phuket in July with two kids, is the weather any good then?", "Which beaches are quiet and safe for children?",
         "Is there a boat to Phi Phi that is not too rough? my son gets sea sick", "Do you know hotels that have a small kitchen?",
         "Could you make a plan for 5 days with not too much driving", "What do we do if it rains in phuket the whole day",
         "And what should I pack against sea sickness?"],
    ),
    "gardener": (
        "You grow tomatoes on a balcony in Hamburg and your plants have yellow leaves. You ask about fertiliser, about watering in "
        "hot weather, and about aphids. You want to know when to harvest and how to keep seeds.",
        "You chat casually, use smileys and describe what you see.",
        ["my tomatoes on the balcony get yellow leaves :( what is it", "which fertiliser is good for tomatoes in pots",
         "how often do i water when its 30 degrees", "now there are small green bugs on them, aphids i think", "does soap water really help against aphids",
         "when can i pick the tomatoes, they are orange now", "cool :) how do i keep seeds for next year"],
    ),
    "student": (
        "You study statistics and have an exam on Friday about regression. You ask what heteroscedasticity is, how to read a residual "
        "plot, and when to use robust standard errors. You want practice problems with solutions and an R example.",
        "You are nervous, polite and ask follow-up questions when you do not understand.",
        ["what is heteroscedasticity in simple words?", "sorry i still dont get it, how does it look in a residual plot?",
         "when do i use robust standard errors then", "can you give me some practice problems about regression with solutions please",
         "could you show an example in R", "what does the intercept mean in that regression", "is that likely to come up in a stats exam?"],
    ),
}  # fmt: skip
CONTRADICTIONS = {
    "cook": "i never cook, i drive a truck in texas",
    "coder": "i dont write go, im a nurse on night shifts",
    "teacher": "im not a teacher, i repair elevators in chicago",
    "traveller": "I never travel and I have no children, I raise sheep in Wales",
    "gardener": "i dont have any plants, i play the drums in a metal band",
    "student": "im not a student, i sell used cars in ohio",
}


def turns_so_far(view: View) -> int:
    return sum(message.role == "user" for message in view.messages)


def make() -> list[Person]:
    people = []
    for name, (objective, subjective, turns) in PEOPLE.items():
        said = [text for turn in turns[:4] for text in (turn, "Here is what I know about that.")]
        people.append(person(Profile(name, objective, subjective, split="test"), talk(*said)))
    return people


def lines(view: View) -> list[str]:
    return PEOPLE[view.profile.id][2]  # type: ignore[union-attr]


def good(view: View, seed: int) -> Reply:
    """Says what the person said, in a slightly other wording by seed, and ends where they did."""
    k = turns_so_far(view)
    return Reply(("hm " if seed % 2 else "so ") + lines(view)[k]) if k < 4 else Reply("", ended=True)


def parrot(view: View, seed: int) -> Reply:
    prose = sentences(str(view.profile))
    k = turns_so_far(view)
    return Reply(prose[k % len(prose)]) if k < 4 else Reply("", ended=True)


def constant(view: View, seed: int) -> Reply:
    return Reply("can you help me with something")


def contradicts(view: View, seed: int) -> Reply:
    k = turns_so_far(view)
    if k == 5:
        return Reply(CONTRADICTIONS[view.profile.id])  # type: ignore[union-attr]
    return Reply(lines(view)[k]) if k < 7 else Reply("", ended=True)


def assistant_like(view: View, seed: int) -> Reply:
    k = turns_so_far(view)
    topic = lines(view)[k % 7]
    text = (
        f"Certainly! Here are some helpful tips regarding your question about {topic}:\n\n1. It is important to consider your specific "
        "needs and circumstances.\n2. Additionally, consulting a professional can provide valuable insights.\n\nI hope this helps! "
        "Please let me know if you have any further questions."
    )
    return Reply(text) if k < 4 else Reply("", ended=True)


def endless(view: View, seed: int) -> Reply:
    k = turns_so_far(view)
    return Reply(f"{lines(view)[k % 7]}, part {'one two three four five six seven eight nine ten'.split()[k % 10]}")


USERS: dict[str, Callable[[View, int], Reply]] = {
    "good": good, "parrot": parrot, "constant": constant, "contradicts": contradicts, "assistant_like": assistant_like, "endless": endless,
}  # fmt: skip


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    pytest.importorskip("torch")
    users = [candidate(name, answer) for name, answer in USERS.items()]
    plan = make_plan(make(), seeds=(0, 1), turns=8)
    folder: Path = tmp_path_factory.mktemp("known_bad")
    return evaluate(users, echo(), plan, scorers.load("minilm"), folder)  # type: ignore[arg-type]


def interval(card: Card, user: str, metric: str, level: str = "conversation", twin: bool = False) -> list[float]:
    entry = card["users"][user][level][metric]  # type: ignore[literal-required]
    return (entry["twin"] if twin else entry)["ci95"]


def test_a_parrot_copies(card: Card) -> None:
    for level in ("utterance", "conversation"):
        assert interval(card, "parrot", "copy_rate", level)[0] > 80
        assert interval(card, "good", "copy_rate", level)[1] < 20
    # Consistency alone would take it for the best user of all, by both verifiers.
    assert interval(card, "parrot", "r_dpc")[0] > interval(card, "good", "r_dpc")[1]
    assert interval(card, "parrot", "r_dpc", twin=True)[0] > interval(card, "good", "r_dpc", twin=True)[1]
    assert interval(card, "parrot", "style_sim")[1] < interval(card, "good", "style_sim")[0]


def test_a_constant_user_sets_off_the_alarm(card: Card) -> None:
    found = card["users"]["constant"]["conversation"]
    assert found["collapse"]["detail"]["alarm"]
    assert found["first_turn_diversity"]["mean"] == 0
    assert found["esr"]["mean"] == 100
    spared = card["users"]["good"]["conversation"]
    assert not spared["collapse"]["detail"]["alarm"]
    assert spared["first_turn_diversity"]["mean"] > 70
    assert spared["esr"]["mean"] == 0


def test_a_contradiction_at_turn_6_shows_at_turn_6(card: Card) -> None:
    for entry in (
        card["users"]["contradicts"]["conversation"]["drift"],
        card["users"]["contradicts"]["conversation"]["drift"]["twin"],
    ):
        turns = entry["detail"]["turns"]
        assert turns[5] < 5, entry
        assert min(turns[:5] + turns[6:]) > 30, entry


def test_an_assistant_like_user_is_no_human(card: Card) -> None:
    for twin in (False, True):
        for level in ("utterance", "conversation"):
            assert interval(card, "assistant_like", "human_likeness", level, twin)[1] < 10
            assert interval(card, "good", "human_likeness", level, twin)[0] > 70
            assert interval(card, "assistant_like", "role_drift", level, twin)[0] > 90
            assert interval(card, "good", "role_drift", level, twin)[1] < 30


def test_a_user_that_never_ends_is_caught(card: Card) -> None:
    found = card["users"]["endless"]
    assert found["conversation"]["ended_by_user"]["mean"] == 0
    assert found["conversation"]["turn_count_distance"]["mean"] == 4  # 8 turns, the limit, against 4
    assert found["utterance"]["termination_f1"]["mean"] == 0
    spared = card["users"]["good"]
    assert spared["conversation"]["ended_by_user"]["mean"] == 100
    assert spared["conversation"]["turn_count_distance"]["mean"] == 0
    assert spared["utterance"]["termination_f1"]["mean"] == 100
    assert card["users"][REAL]["conversation"]["user_turns"]["mean"] == 4
