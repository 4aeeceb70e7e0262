"""Which conversations the first scorer of `goal` is calibrated on."""

from __future__ import annotations

from training.goal_scorer import aligned_cases
from usp_env.dialogue import Dialogue
from usp_env.profiles import Profile


def test_cases_have_one_detail_for_each_user_turn() -> None:
    talk = Dialogue.of(
        [
            {"role": "user", "content": "how long do i boil eggs"},
            {"role": "assistant", "content": "Six minutes."},
            {"role": "user", "content": "and quail eggs?"},
        ]
    )

    def person(id: str, *details: str) -> Profile:
        return Profile(id, "You cook.", "You are terse.", {"objective_facts": {"scenarios": [{"task_details": list(details)}]}})

    people = [person("one", "Eggs."), person("two", "Eggs.", "Quail eggs."), person("three", "Eggs.", "Quail eggs.", "Ham.")]
    cases = aligned_cases([(profile, talk) for profile in people])
    assert [(case.profile.id, case.turns) for case in cases] == [("two", ["how long do i boil eggs", "and quail eggs?"])]
