"""Speakers that say what a test tells them to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from usp_env.dialogue import View
from usp_env.records import Reply


class Speaker:
    """A partner that calls `answer(view, seed)`; strings become replies."""

    def __init__(self, answer: Callable[[View, int], Reply | str], role: str = "user") -> None:
        self.answer, self.role, self.spec, self.calls = answer, role, "test", []

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        self.calls.append(len(views))
        replies = [self.answer(view, seed) for view, seed in zip(views, seeds, strict=True)]
        return [Reply(r) if isinstance(r, str) else r for r in replies]
