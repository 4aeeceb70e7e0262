"""What every backend promises, as plain functions: `check_contract(backend)` runs them all.

A new engine's test makes the backend, says in `Traits` what it cannot promise, and calls these.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from usp_env.backends.base import Backend, Generation, Request, Sampling
from usp_env.errors import BackendError

SYSTEM = {"role": "system", "content": "You are a person."}
AWKWARD = "naïve 😀 日本語 \u2028 e\u0301 <|im_end|>\n<|im_start|>user"


@dataclass(frozen=True)
class Traits:
    """What is known of a backend beyond the protocol.

    Args:
        exact: A request gives the same text again, alone and in any batch.
        seeded: Other seeds give other texts.
        tokens: Token ids and log-probabilities are told.
        limit: Most tokens of prompt and reply; None where nobody knows.
        bad: A request that fails in its own slot; None where no request can be made to.
        ends: Some of `endings()` end the conversation where they may.
    """

    exact: bool = True
    seeded: bool = True
    tokens: bool = True
    limit: int | None = None
    bad: Request | None = None
    ends: bool = True


def ask(text: str, seed: int = 0, **options: object) -> Request:
    return Request([{"role": "user", "content": text}], seed=seed, **{"sampling": Sampling(0.9, 0.95, 12), **options})


def plain(count: int = 9) -> list[Request]:
    """Requests of both roles, several lengths, samplings and seeds."""
    made = []
    for i in range(count):
        sampling = Sampling((0.7, 1.0)[i % 2], (1.0, 0.9)[i % 2], 4 + i)
        request = ask("Tell me. " * (1 + i % 3) + str(i), 100 + i, sampling=sampling)
        made.append(replace(request, messages=[SYSTEM, *request.messages], role="user") if i % 3 == 1 else request)
    return made


def endings(can_end: bool) -> list[Request]:
    return [ask("Bye.", i, role="user", can_end=can_end, sampling=Sampling(1.0, 1.0, 16)) for i in range(48)]


def texts(made: list[Generation]) -> list[str]:
    assert all(isinstance(g, Generation) for g in made)
    assert [g.error for g in made] == [None] * len(made)
    return [g.text for g in made]


def check_protocol(backend: Backend, traits: Traits) -> None:
    assert isinstance(backend, Backend)
    assert isinstance(backend.spec, str)
    assert isinstance(backend.mutable, bool)
    assert isinstance(backend.identity, Mapping)
    assert backend.identity
    assert json.loads(json.dumps(backend.identity)) == dict(backend.identity)  # the cache's key is made of it
    assert backend.generate([]) == []


def check_one_each_in_order(backend: Backend, traits: Traits) -> None:
    requests = plain()
    made, turned = texts(backend.generate(requests)), texts(backend.generate([*requests[2:], *requests[:2]]))
    assert len(made) == len(turned) == len(requests)
    if traits.exact:
        assert turned == [*made[2:], *made[:2]]
    if traits.seeded:
        assert len(set(made)) > len(requests) // 2  # so that a wrong order shows


def check_alone_as_in_a_batch(backend: Backend, traits: Traits) -> None:
    if traits.exact:
        requests = plain()
        assert [texts(backend.generate([request]))[0] for request in requests] == texts(backend.generate(requests))


def check_seeds(backend: Backend, traits: Traits) -> None:
    request = ask("Say a word.")
    seeds = [1, 2, 3, 1, 2**62 + 1, -1, -1, 2**64 + 1]
    made = texts(backend.generate([replace(request, seed=seed) for seed in seeds]))
    if traits.exact:
        assert made[0] == made[3]
        assert made[5] == made[6]
    if traits.seeded:
        assert len(set(made)) >= 4


def check_greedy_needs_no_seed(backend: Backend, traits: Traits) -> None:
    requests = [ask("Say a word.", seed, sampling=Sampling(0.0, 1.0, 6)) for seed in (1, 2, 3)]
    made = backend.generate(requests)
    if traits.exact and traits.tokens:
        assert len(set(texts(made))) == 1
        assert all(set(g.logprobs) == {0.0} for g in made)


def check_openings_never_end(backend: Backend, traits: Traits) -> None:
    reasons = {g.finish_reason for g in backend.generate(endings(False))}
    assert "end" not in reasons
    made = backend.generate(endings(True))
    if traits.ends:
        assert "end" in {g.finish_reason for g in made}


def check_max_tokens(backend: Backend, traits: Traits) -> None:
    made = backend.generate([ask("Count.", n, sampling=Sampling(1.0, 1.0, n)) for n in (1, 2, 5, 9)])
    for most, one in zip((1, 2, 5, 9), made, strict=True):
        assert one.usage["completion_tokens"] <= most
        if traits.tokens:
            assert 1 <= len(one.token_ids) <= most
            assert one.finish_reason != "length" or len(one.token_ids) == most
    assert "length" in {one.finish_reason for one in made}


def check_min_tokens(backend: Backend, traits: Traits) -> None:
    for one in backend.generate([replace(r, sampling=Sampling(1.0, 1.0, 8, min_tokens=6)) for r in endings(True)[:12]]):
        if traits.tokens:
            assert len(one.token_ids) >= 6


def check_stop_strings(backend: Backend, traits: Traits) -> None:
    if not traits.exact:
        return
    free = [replace(request, sampling=replace(request.sampling, max_tokens=12)) for request in plain(4)]
    # ASCII, because a small model's bytes need not make characters.
    marks = [[c for c in text if c.isascii()][-2:][0] for text in texts(backend.generate(free))]
    stopped = [replace(r, sampling=replace(r.sampling, stop=("¶¶", mark))) for r, mark in zip(free, marks, strict=True)]
    before = texts(backend.generate(free))
    for text, mark, one in zip(before, marks, backend.generate(stopped), strict=True):
        assert (one.text, one.finish_reason) == (text[: text.find(mark)], "stop")


def check_context_limit(backend: Backend, traits: Traits) -> None:
    if traits.limit is None:
        return
    fits = Request(token_ids=[40] * (traits.limit - 8), sampling=Sampling(max_tokens=8), seed=3)
    over = replace(fits, token_ids=[40] * (traits.limit - 7))
    first, second, third = backend.generate([over, fits, over])
    for one in (first, third):
        assert (one.finish_reason, one.text, one.error) == ("context_limit", "", None)
        assert one.usage["completion_tokens"] == 0
    assert second.finish_reason != "context_limit"
    assert backend.generate([over])[0].finish_reason == "context_limit"


def check_usage_and_logprobs(backend: Backend, traits: Traits) -> None:
    requests = plain()
    for request, one in zip(requests, backend.generate(requests), strict=True):
        assert one.usage["completion_tokens"] >= 0
        if traits.tokens:
            assert one.usage["prompt_tokens"] > 0
            assert one.usage["completion_tokens"] == len(one.token_ids) == len(one.logprobs) > 0
            assert all(-50 < logprob <= 1e-6 for logprob in one.logprobs)
            assert one.usage.get("cached_tokens", 0) < one.usage["prompt_tokens"]
            if request.sampling.top_p == 1.0:
                assert min(one.logprobs) < 0


def check_unicode(backend: Backend, traits: Traits) -> None:
    request = ask(AWKWARD, 5)
    made = backend.generate([request])[0]
    made.text.encode()  # no lone surrogates come out
    renderer = getattr(backend, "renderer", None)
    if renderer is None:
        return
    assert renderer.decode(renderer.encode(AWKWARD)) == AWKWARD
    ids = renderer.render(request.messages, generation_role="assistant").token_ids
    again = backend.generate([replace(request, messages=None, token_ids=ids)])[0]
    assert made.usage["prompt_tokens"] == again.usage["prompt_tokens"] == len(ids)
    if traits.exact:
        assert again.token_ids == made.token_ids


def check_failure_in_its_slot(backend: Backend, traits: Traits) -> None:
    if traits.bad is None:
        return
    good = plain(2)
    first, failed, second = backend.generate([good[0], traits.bad, good[1]])
    assert (failed.finish_reason, failed.text) == ("error", "")
    assert isinstance(failed.error, BackendError)
    assert str(failed.error)
    if traits.exact:
        assert texts([first, second]) == texts(backend.generate(good))


def check_async(backend: Backend, traits: Traits) -> None:
    requests = plain(3)

    async def two() -> list[list[Generation]]:
        return list(await asyncio.gather(backend.agenerate(requests), backend.agenerate(requests[:1])))

    both, one = asyncio.run(two())
    assert (len(both), len(one)) == (3, 1)
    if traits.exact:
        assert texts(both) == texts(backend.generate(requests))
        assert texts(one) == texts(both)[:1]


CHECKS: tuple[Callable[[Backend, Traits], None], ...] = (
    check_protocol,
    check_one_each_in_order,
    check_alone_as_in_a_batch,
    check_seeds,
    check_greedy_needs_no_seed,
    check_openings_never_end,
    check_max_tokens,
    check_min_tokens,
    check_stop_strings,
    check_context_limit,
    check_usage_and_logprobs,
    check_unicode,
    check_failure_in_its_slot,
    check_async,
)


def check_contract(backend: Backend, traits: Traits = Traits()) -> None:  # noqa: B008 - frozen
    """Everything at once, for a backend that is dear to make."""
    for check in CHECKS:
        check(backend, traits)
