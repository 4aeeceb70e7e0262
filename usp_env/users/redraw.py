"""Drafts that are judged and drawn again: what UserLM's guardrails and DuetSim's verifier share.

It is a backend, so that a speaker in front of it stays a plain `ModelSpeaker` in every driver. What is asked of whom is a
generator that knows no I/O; `generate` and `agenerate` do the asking.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from usp_env.backends.base import Backend, Generation, Request, failed
from usp_env.errors import BackendError
from usp_env.records import generation_seed

RETRIES = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one draft.

    Args:
        objection: Why the draft is refused; None takes it.
        made: What the judging model produced, where a model judged; one with `error` set fails the reply.
    """

    objection: str | None = None
    made: Generation | None = None


Steps = Generator[tuple[Backend, Sequence[Request]], list[Generation], Any]
"""Yields what to ask of which engine, is sent the answers, returns what came of it."""
Judge = Callable[[Sequence[Request], Sequence[Generation]], Steps]
"""Steps that return one `Verdict` per draft."""


@dataclass(frozen=True)
class RedrawingBackend:
    """Draws again, with a derived seed, what a judge refuses; after `retries` redraws the last draft is taken.

    A round is one call of the engine (and of the judge) for all open rows. The first draft has the row's own seed: a judge
    without objections changes nothing. `usage` counts the reply's own tokens; those of refused drafts and of the judge are
    `extra_prompt_tokens` and `extra_completion_tokens`; a failed row has them too, for they are paid. Objections are in `notes`,
    and `unjudged` where the conversation did not fit the judge: the draft is then taken, as a redraw would not fit either, and
    whoever wants only judged utterances can tell.

    Args:
        inner: Makes the drafts.
        judge: Asked only about drafts that exist (no failed call, no full context).
        retries: Most redraws of a row.
        judge_identity: What decides the verdicts, for `identity`.
    """

    inner: Backend
    judge: Judge
    retries: int = RETRIES
    judge_identity: Callable[[], Mapping[str, Any]] = dict

    @property
    def spec(self) -> str:
        """The drafting engine's."""
        return self.inner.spec

    @property
    def mutable(self) -> bool:
        """Whether the drafting engine's weights can change."""
        return self.inner.mutable

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the output besides the request."""
        return {"drafts": dict(self.inner.identity), "judge": dict(self.judge_identity()), "retries": self.retries}

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation per request, in order; a failed draft or verdict fails its row alone."""
        steps, answers = self._draw(requests), None
        try:
            while True:
                backend, asked = steps.send(answers)  # type: ignore[arg-type] # None starts a generator
                try:
                    answers = backend.generate(asked)
                except BackendError as error:  # others of the batch are done already
                    answers = [failed(error)] * len(asked)
        except StopIteration as over:
            return list(over.value)

    async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` for event loops."""
        steps, answers = self._draw(requests), None
        try:
            while True:
                backend, asked = steps.send(answers)  # type: ignore[arg-type]
                try:
                    answers = await backend.agenerate(asked)
                except BackendError as error:
                    answers = [failed(error)] * len(asked)
        except StopIteration as over:
            return list(over.value)

    def _draw(self, requests: Sequence[Request]) -> Steps:
        done: dict[int, Generation] = {}
        history: list[list[tuple[Generation, Verdict]]] = [[] for _ in requests]
        for attempt in range(self.retries + 1):
            rows = [i for i in range(len(requests)) if i not in done]
            asked = [_redrawn(requests[i], attempt) for i in rows]
            drafts = yield from ask(self.inner, asked)
            made = [k for k, draft in enumerate(drafts) if draft.finish_reason not in ("error", "context_limit")]
            found = yield from self.judge([asked[k] for k in made], [drafts[k] for k in made])
            verdicts = dict(zip(made, found, strict=True))
            for k, i in enumerate(rows):
                verdict = verdicts.get(k, Verdict())
                history[i].append((drafts[k], verdict))
                if verdict.objection is None or attempt == self.retries:
                    done[i] = _settled(history[i])
        return [done[i] for i in range(len(requests))]


def ask(backend: Backend, requests: Sequence[Request]) -> Steps:
    """The step that asks an engine; none without requests."""
    return (yield backend, requests) if requests else []


def _redrawn(request: Request, attempt: int) -> Request:
    return replace(request, seed=generation_seed(request.seed, "draft", 0, "user", attempt)) if attempt else request


def _settled(history: Sequence[tuple[Generation, Verdict]]) -> Generation:
    """The last draft, or the failure of its verdict, with what else was paid for it: refused drafts and the judge."""
    draft, last = history[-1]
    earlier = [old for old, _ in history[:-1]]
    judged = [verdict.made for _, verdict in history if verdict.made is not None]
    if last.made is not None and last.made.error is not None:
        return _with_costs(failed(last.made.error), [*earlier, draft, *judged])
    made = _with_costs(draft, [*earlier, *judged])
    if draft.error is not None:
        return made
    objections = [verdict.objection for _, verdict in history if verdict.objection is not None]
    notes: dict[str, Any] = {"objections": objections, "taken": last.objection is None} if objections else {}
    if last.made is not None and last.made.finish_reason == "context_limit":
        notes["unjudged"] = True
    return replace(made, notes={**made.notes, **notes})


def _with_costs(made: Generation, extra: Sequence[Generation]) -> Generation:
    if not extra:
        return made
    costs = {f"extra_{key}": sum(g.usage.get(key, 0) for g in extra) for key in ("prompt_tokens", "completion_tokens")}
    return replace(made, usage={**made.usage, **costs})
