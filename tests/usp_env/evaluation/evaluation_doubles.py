"""People, users and scorers whose every value can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from usp_env.dialogue import Dialogue, View
from usp_env.evaluation.people import Person, person
from usp_env.evaluation.plan import Candidate, Plan
from usp_env.evaluation.scorers import Scorer, Scorers
from usp_env.profiles import Profile
from usp_env.records import Reply

_COLUMNS: dict[str, int] = {}
TOPICS = ("leeks", "yarn", "trains", "chess", "moss", "drums")


def talk(*texts: str) -> Dialogue:
    """A conversation that the user begins, turn about."""
    return Dialogue.of({"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts))


def make_people(n: int = 4) -> list[Person]:
    """People of 2 turns each, who end their conversation; the last one's goes on elsewhere."""
    people = []
    for k, topic in enumerate(TOPICS[:n]):
        said = talk(f"tell me about {topic}", f"{topic} are fine", f"thanks for the {topic} advice {k}", "bye")
        profile = Profile(f"p{k}", f"You ask about {topic}. You own {k} cats.", "You write tersely.", split="test")
        people.append(person(profile, said, continued=k == n - 1))
    return people


def words_embed(texts: Sequence[str]) -> np.ndarray:
    """Bags of words: equal texts have cosine 1, texts without a common word 0."""
    rows = np.zeros((len(texts), 512))
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            row[_COLUMNS.setdefault(word, len(_COLUMNS) % 512)] += 1
    return rows


def length_style(texts: Sequence[str]) -> np.ndarray:
    """Style is a text's length and its first letter's case."""
    return np.array([[len(text), 10.0 * text[:1].islower()] for text in texts])


def short_is_human(texts: Sequence[str]) -> np.ndarray:
    return np.array([float(len(text) < 60) for text in texts])


class SharedWords:
    """Supports what shares a word with it."""

    def supported(self, turns: Sequence[Sequence[str]], facts: Sequence[str]) -> np.ndarray:
        return np.array([_shares(" ".join(own), fact) for own, fact in zip(turns, facts, strict=True)])

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> np.ndarray:
        return np.array([_shares(profile, turn) for profile, turn in zip(profiles, turns, strict=True)])


class Never(SharedWords):
    def supported(self, turns: Sequence[Sequence[str]], facts: Sequence[str]) -> np.ndarray:
        return np.zeros(len(facts))

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> np.ndarray:
        return np.zeros(len(turns))


def _shares(a: str, b: str) -> float:
    mine, theirs = ({word.strip(".").lower() for word in text.split()} for text in (a, b))
    return float(bool(mine & theirs - {"you", "about"}))


def make_scorers(**parts: Any) -> Scorers:
    known: dict[str, Any] = {
        "embed": Scorer(words_embed, "words"),
        "style": Scorer(length_style, "length"),
        "style_threshold": 0.99,
        "human": Scorer(short_is_human, "short", lambda texts: np.zeros(len(texts)), "short-twin"),
        "facts": Scorer(SharedWords(), "shared", Never(), "never"),
    }
    return Scorers(**{**known, **parts})


class Actor:
    """A user or assistant that calls `answer(view, seed)`; counts what it was asked for."""

    def __init__(self, answer: Callable[[View, int], Reply | str], role: str = "user", spec: str = "actor") -> None:
        self.answer, self.role, self.spec, self.asked = answer, role, spec, 0

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        self.asked += len(views)
        replies = [self.answer(view, seed) for view, seed in zip(views, seeds, strict=True)]
        return [Reply(reply) if isinstance(reply, str) else reply for reply in replies]


def real_turns(people: Sequence[Person]) -> Callable[[View, int], Reply]:
    """Says exactly what the person said, and ends where they did."""
    turns = {who.id: who.turns for who in people}

    def answer(view: View, seed: int) -> Reply:
        own = turns[view.profile.id]  # type: ignore[union-attr]
        said = sum(message.role == "user" for message in view.messages)
        return Reply(own[said]) if said < len(own) else Reply("", ended=True)

    return answer


def candidate(name: str, answer: Callable[[View, int], Reply | str], given: bool = True) -> Candidate:
    return Candidate(name, Actor(answer, spec=name), given)  # type: ignore[arg-type]


def echo() -> Actor:
    return Actor(lambda view, seed: f"so: {view.messages[-1].content}", "assistant", "echo")


def make_plan(people: Sequence[Person], **settings: Any) -> Plan:
    return Plan("test-bank", "test", people, people, settings.pop("neighbours", {}), **settings)
