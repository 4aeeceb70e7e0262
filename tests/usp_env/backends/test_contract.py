"""One contract, every backend. Engines that need a server or a venv of their own call `contract` from their own tests."""

from __future__ import annotations

import hashlib
import random

import pytest
from contract import CHECKS, Traits, check_contract

from usp_env.backends.base import Backend, Generation, Request, Sampling
from usp_env.backends.cache import CacheBackend
from usp_env.backends.coalesce import CoalescingBackend
from usp_env.backends.scripted import ScriptedBackend
from usp_env.errors import BackendError

BAD = Request(token_ids=[10**7], sampling=Sampling(max_tokens=4))
LIMIT = 200


def babble(request: Request) -> Generation | BackendError:
    """A model without weights: letters drawn from a hash of the request, a token each, some of which end the reply."""
    if request.token_ids == BAD.token_ids:
        return BackendError("no such token")
    sampling = request.sampling
    said = request.token_ids or [ord(c) for message in request.messages for c in message["content"]]
    usage = {"prompt_tokens": len(said), "completion_tokens": 0}
    if len(said) + sampling.max_tokens > LIMIT:
        return Generation("", (), (), "context_limit", usage)
    key = f"{list(said)} {request.role} {request.seed if sampling.temperature else 0}"
    rng = random.Random(hashlib.sha256(key.encode()).hexdigest())
    ids, text, reason = [], "", "length"
    while len(ids) < sampling.max_tokens and reason == "length":
        ids.append(rng.randrange(97, 123))
        drawn, may = rng.random(), len(ids) > sampling.min_tokens
        if may and drawn < 0.1:
            ids[-1], reason = (1, "end") if request.can_end else (2, "stop")
        else:
            text += chr(ids[-1])
        if cuts := [text.find(mark) for mark in sampling.stop if mark in text]:
            text, reason = text[: min(cuts)], "stop"
    logprob = -1.0 if sampling.temperature else 0.0
    return Generation(text, tuple(ids), (logprob,) * len(ids), reason, {**usage, "completion_tokens": len(ids)})


def scripted() -> Backend:
    return ScriptedBackend(babble, spec="babble")


def hf() -> Backend:
    pytest.importorskip("torch")
    test_hf = pytest.importorskip("test_hf", exc_type=ImportError)
    from usp_env.backends.hf import HFBackend

    return HFBackend(test_hf.tiny(scale=0.2), test_hf.tokenizer.__wrapped__())


@pytest.fixture(scope="module", params=["scripted", "hf", "cache", "strict", "coalesced"])
def case(request, tmp_path_factory) -> tuple[Backend, Traits]:
    path = tmp_path_factory.mktemp("contract") / "replies.sqlite"
    if request.param == "hf":
        return hf(), Traits(limit=256, bad=BAD)
    traits = Traits(limit=LIMIT, bad=BAD)
    if request.param == "cache":
        return CacheBackend(scripted(), path), traits
    if request.param == "strict":
        check_contract(CacheBackend(scripted(), path), traits)
        return CacheBackend(None, path, "strict"), Traits(limit=LIMIT)  # a failure is never stored
    if request.param == "coalesced":
        return CoalescingBackend(scripted(), max_wait_ms=1.0), traits
    return scripted(), traits


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(case, check) -> None:
    check(*case)


@pytest.mark.assets
@pytest.mark.slow
def test_contract_of_smollm2() -> None:
    from usp_env.backends.hf import HFBackend
    from usp_env.backends.spec import parse

    backend = HFBackend.from_spec(parse("smollm2-135m?device=cpu&max_model_len=512"))
    check_contract(backend, Traits(limit=512, ends=False))


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (lambda made: made[::-1], "one_each_in_order"),
        (lambda made: made[:-1], "one_each_in_order"),
        (
            lambda made: [Generation(g.text + "é\ud800", g.token_ids, g.logprobs, g.finish_reason, g.usage) for g in made],
            "unicode",
        ),
        (lambda made: [Generation(g.text, g.token_ids, g.logprobs, "end", g.usage) for g in made], "openings_never_end"),
        (lambda made: [Generation(g.text, g.token_ids[1:], g.logprobs, "stop", g.usage) for g in made], "usage_and_logprobs"),
    ],
)
def test_the_contract_notices(fault, caught) -> None:
    class Faulty(ScriptedBackend):
        def generate(self, requests):
            return fault(super().generate(requests))

    check = next(check for check in CHECKS if check.__name__ == f"check_{caught}")
    with pytest.raises((AssertionError, UnicodeEncodeError)):
        check(Faulty(babble), Traits())
