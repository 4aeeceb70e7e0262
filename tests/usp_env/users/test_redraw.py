"""Drafts that are refused: rounds, seeds, costs, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from usp_env.backends.base import Backend, Generation, Request
from usp_env.backends.scripted import ScriptedBackend
from usp_env.errors import BackendError
from usp_env.records import generation_seed
from usp_env.users.redraw import RedrawingBackend, Steps, Verdict


def asked(*seeds: int) -> list[Request]:
    return [Request([{"role": "user", "content": "hi"}], seed=seed) for seed in seeds]


def short(requests: Sequence[Request], drafts: Sequence[Generation]) -> Steps:
    """Refuses short drafts."""
    yield from ()
    return [Verdict("short" if len(d.text) < 3 else None) for d in drafts]


def said(text: str) -> Generation:
    return Generation(text, usage={"prompt_tokens": 10, "completion_tokens": len(text)})


def test_refused_drafts_are_drawn_again_in_one_call_a_round() -> None:
    inner = ScriptedBackend([said(text) for text in ("a", "long", "b", "cc", "done", "more")])
    made = RedrawingBackend(inner, short, retries=3).generate(asked(1, 2, 3))
    # a, long, b: rows 0 and 2 are refused. cc, done: row 0 is. more: none is.
    assert inner.batches == [3, 2, 1]
    assert [g.text for g in made] == ["more", "long", "done"]
    assert made[1] == said("long")


def test_k_refusals_make_k_plus_one_drafts_with_derived_seeds() -> None:
    inner = ScriptedBackend([said("a"), said("bb"), said("long")])
    made = RedrawingBackend(inner, short, retries=3).generate(asked(5))
    assert [r.seed for r in inner.history] == [5, *(generation_seed(5, "draft", 0, "user", k) for k in (1, 2))]
    assert made[0].text == "long"
    assert made[0].usage == {
        "prompt_tokens": 10, "completion_tokens": 4, "extra_prompt_tokens": 20, "extra_completion_tokens": 3,
    }  # fmt: skip
    assert made[0].notes == {"objections": ["short", "short"], "taken": True}


def test_the_last_draft_is_taken_when_the_retries_are_spent() -> None:
    inner = ScriptedBackend([said("a"), said("b"), said("c"), said("never asked")])
    made = RedrawingBackend(inner, short, retries=2).generate(asked(5))
    assert made[0].text == "c"
    assert made[0].notes == {"objections": ["short"] * 3, "taken": False}
    assert inner.batches == [1, 1, 1]


def test_failed_and_impossible_drafts_are_not_judged_and_fail_alone() -> None:
    full = Generation("", finish_reason="context_limit")
    inner = ScriptedBackend([BackendError("down"), full, said("long")])
    made = RedrawingBackend(inner, short).generate(asked(1, 2, 3))
    assert (str(made[0].error), made[1], made[2]) == ("down", full, said("long"))
    assert inner.batches == [3]


def test_a_call_that_fails_whole_keeps_what_was_drawn_before() -> None:
    class Dies(ScriptedBackend):
        def generate(self, requests: Sequence[Request]) -> list[Generation]:
            if len(requests) == 1:
                raise BackendError("gone")
            return super().generate(requests)

        async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
            return self.generate(requests)

    lines = [said("long"), said("a")]
    made = RedrawingBackend(Dies(lines), short).generate(asked(1, 2))
    for first, second in (made, asyncio.run(RedrawingBackend(Dies(lines), short).agenerate(asked(1, 2)))):
        assert first == said("long")
        assert (str(second.error), second.text) == ("gone", "")


def test_a_failed_verdict_fails_its_row() -> None:
    down = Generation("", finish_reason="error", error=BackendError("judge down"))

    def judge(requests: Sequence[Request], drafts: Sequence[Generation]) -> Steps:
        yield from ()
        return [Verdict(made=down if d.text == "a" else said("yes")) for d in drafts]

    made = RedrawingBackend(ScriptedBackend([said("a"), said("long")]), judge).generate(asked(1, 2))
    assert str(made[0].error) == "judge down"
    assert made[1].text == "long"
    assert made[1].usage["extra_completion_tokens"] == 3


def test_a_failed_row_tells_what_was_paid_for_it() -> None:
    def judge(requests: Sequence[Request], drafts: Sequence[Generation]) -> Steps:
        yield from ()
        down = Generation("", finish_reason="error", error=BackendError("judge down"))
        return [Verdict("no", said("no!")) if d.text == "a" else Verdict(made=down) for d in drafts]

    # Draft "a" (10 + 1 tokens) and its verdict (10 + 3), then draft "long" (10 + 4), whose verdict fails.
    verdict = RedrawingBackend(ScriptedBackend([said("a"), said("long")]), judge).generate(asked(1))[0]
    assert str(verdict.error) == "judge down"
    assert verdict.usage == {"extra_prompt_tokens": 30, "extra_completion_tokens": 8}
    # Draft "a" and its verdict, then a draft that fails.
    draft = RedrawingBackend(ScriptedBackend([said("a"), BackendError("down")]), judge).generate(asked(1))[0]
    assert (str(draft.error), draft.text) == ("down", "")
    assert {kind: draft.usage[kind] for kind in draft.usage if kind.startswith("extra")} == {
        "extra_prompt_tokens": 20, "extra_completion_tokens": 4,
    }  # fmt: skip


def test_identity_and_the_async_door() -> None:
    inner = ScriptedBackend(lambda request: "long", spec="one")
    backend = RedrawingBackend(inner, short, 2, lambda: {"rule": "short"})
    assert backend.identity == {"drafts": {"engine": "scripted", "spec": "one"}, "judge": {"rule": "short"}, "retries": 2}
    assert (backend.spec, backend.mutable) == ("one", False)
    assert isinstance(backend, Backend)
    assert asyncio.run(backend.agenerate(asked(1)))[0].text == "long"
