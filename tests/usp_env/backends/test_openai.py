"""The OpenAI backend against a server of ours that fails on purpose."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("tenacity")

from faulty_server import Action, FaultyServer, Seen, answer, answer_text, fault, faulty, serve, status  # noqa: E402

from usp_env.backends import wire  # noqa: E402
from usp_env.backends.base import Backend, Generation, Request, Sampling  # noqa: E402
from usp_env.backends.openai import OpenAIBackend  # noqa: E402
from usp_env.backends.spec import parse  # noqa: E402
from usp_env.errors import BackendError, SpecError  # noqa: E402

KEY = "sk-very-secret-0123456789"


def ask(text: str, **kwargs: Any) -> Request:
    return Request([{"role": "user", "content": text}], **kwargs)


def one(respond: Callable[[Seen], Action], request: Request | None = None, **options: Any) -> tuple[Generation, FaultyServer]:
    """One call of a fresh backend against a fresh server."""
    with serve(respond) as (server, url):
        backend = OpenAIBackend("m", [url], key=KEY, **{"timeout": 5.0, "backoff": 0.01, **options})
        try:
            return backend.generate([request or ask("hi")])[0], server
        finally:
            backend.close()


def failing_first(action: Action, times: int = 1) -> Callable[[Seen], Action]:
    return lambda seen: action if seen.attempt < times else answer(seen)


# ── A9: faults in a fifth of the calls ───────────────────────────────────────────────────────────────


@dataclass
class Outcome:
    generation: Generation
    seconds: float
    attempts: list[Seen]


def run_faulty(n: int, deadline: float, share: float = 0.2, concurrency: int = 64) -> list[Outcome]:
    with serve(faulty(share)) as (server, url):
        backend = OpenAIBackend("m", [url], key=KEY, timeout=deadline, backoff=0.01, concurrency=concurrency)

        async def call(i: int, slots: asyncio.Semaphore) -> tuple[Generation, float]:
            async with slots:  # so that the measured time holds no queueing
                start = time.perf_counter()
                [made] = await backend.agenerate([ask(f"question {i}", seed=i)])
                return made, time.perf_counter() - start

        async def calls() -> list[tuple[Generation, float]]:
            slots = asyncio.Semaphore(concurrency)
            return await asyncio.gather(*(call(i, slots) for i in range(n)))

        results = asyncio.run(calls())
        backend.close()
        attempts: dict[str, list[Seen]] = defaultdict(list)
        for seen in server.seen:
            attempts[seen.body["messages"][0]["content"]].append(seen)
        assert server.most_concurrent <= concurrency
    return [Outcome(*result, attempts[f"question {i}"]) for i, result in enumerate(results)]


def check_faulty(outcomes: list[Outcome], deadline: float, share: float = 0.2, slack: float = 1.5) -> dict[str, float]:
    kinds: dict[str, int] = defaultdict(int)
    for i, outcome in enumerate(outcomes):
        made, faults = outcome.generation, [fault(seen, share) for seen in outcome.attempts]
        if made.error is None:
            assert made.text == answer_text(outcome.attempts[-1].body), f"call {i} got another text"
            assert outcome.attempts[-1].body["seed"] == i
            assert faults[-1] is None
            kinds["answered"] += 1
        else:
            assert isinstance(made.error, BackendError)
            assert (made.text, made.finish_reason) == ("", "error")
            assert faults[-1] in ("stall", "stall_body") or len(faults) == 6, f"call {i} failed after {faults}"
            assert f"within {deadline:g} s" in str(made.error) or "6 attempt(s)" in str(made.error)
            kinds["failed"] += 1
        assert all(kind is not None for kind in faults[:-1]), "an answered call was asked again"
        assert outcome.seconds <= deadline + slack
    faults_seen = [fault(seen, share) for outcome in outcomes for seen in outcome.attempts]
    return {**kinds, "attempts": len(faults_seen), "faults": sum(f is not None for f in faults_seen)} | {
        "slowest": max(outcome.seconds for outcome in outcomes)
    }


def test_no_reply_is_lost_or_invented() -> None:
    figures = check_faulty(run_faulty(300, 3.0), 3.0)
    assert figures["answered"] + figures["failed"] == 300
    assert figures["faults"] / figures["attempts"] == pytest.approx(0.2, abs=0.07)


@pytest.mark.slow
def test_no_reply_of_2000_is_lost_or_invented() -> None:
    figures = check_faulty(run_faulty(2000, 5.0), 5.0)
    assert figures["answered"] + figures["failed"] == 2000


def test_every_slot_of_one_batch_is_its_own() -> None:
    def respond(seen: Seen) -> Action:
        return status(400, "bad") if seen.body["seed"] % 3 == 0 else replace(answer(seen), delay=0.05)

    with serve(respond) as (server, url):
        backend = OpenAIBackend("m", [url], concurrency=8)
        made = backend.generate([ask(f"q{i}", seed=i) for i in range(60)])
        backend.close()
    assert [g.error is not None for g in made] == [i % 3 == 0 for i in range(60)]
    by_seed = {seen.body["seed"]: answer_text(seen.body) for seen in server.seen}
    assert all(g.text == by_seed[i] for i, g in enumerate(made) if not g.error)
    assert 4 <= server.most_concurrent <= 8
    assert isinstance(backend, Backend)


# ── the policy ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 529])
def test_passing_statuses_are_retried(code: int) -> None:
    made, server = one(failing_first(status(code), 2))
    assert made.text == answer_text(server.seen[0].body)
    assert len(server.seen) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 410, 413, 422, 431, 451])
def test_final_statuses_are_asked_once(code: int) -> None:
    made, server = one(lambda seen: status(code, f"refused {code}"))
    assert len(server.seen) == 1
    assert isinstance(made.error, BackendError)
    assert f"HTTP {code}" in str(made.error)
    assert f"refused {code}" in str(made.error)


def test_attempts_are_bounded() -> None:
    made, server = one(lambda seen: status(503, "overloaded"), max_attempts=4)
    assert len(server.seen) == 4
    assert "after 4 attempt(s)" in str(made.error)
    assert "overloaded" in str(made.error)


def test_retry_after_is_kept() -> None:
    start = time.perf_counter()
    made, _ = one(failing_first(status(429, headers={"retry-after": "0.7"})))
    assert made.error is None
    assert time.perf_counter() - start >= 0.7


def test_retry_after_beyond_the_deadline_fails_at_once() -> None:
    start = time.perf_counter()
    made, server = one(lambda seen: status(429, headers={"retry-after": "60"}), timeout=5.0)
    assert time.perf_counter() - start < 3.0
    assert "HTTP 429" in str(made.error)
    assert len(server.seen) == 1


@pytest.mark.parametrize("kind", ["stall", "stall_body"])
def test_a_stall_meets_the_deadline(kind: Any) -> None:
    start = time.perf_counter()
    made, _ = one(lambda seen: Action(answer(seen).body, kind=kind), timeout=0.5)
    assert 0.5 <= time.perf_counter() - start < 2.0
    assert "no answer within 0.5 s" in str(made.error)


def test_the_deadline_includes_the_retries() -> None:
    start = time.perf_counter()
    made, server = one(lambda seen: status(500), timeout=0.6, max_attempts=1000, backoff=0.1)
    assert time.perf_counter() - start < 1.1
    assert made.error is not None
    assert 2 <= len(server.seen) < 10


def test_a_queued_call_does_not_use_up_its_deadline() -> None:
    with serve(lambda seen: replace(answer(seen), delay=0.25)) as (_, url):
        backend = OpenAIBackend("m", [url], concurrency=1, timeout=1.0)
        made = backend.generate([ask(f"q{i}") for i in range(6)])
        backend.close()
    assert all(g.error is None for g in made)


MALFORMED = {
    "cut off": b'{"choices": [{"message": {"content": "I was goi',
    "html": b"<html>Bad gateway</html>",
    "nothing": b"",
    "no choices": b'{"choices": []}',
    "an error inside a 200": b'{"error": {"message": "overloaded"}}',
    "no message": b'{"choices": [{"finish_reason": "stop"}]}',
    "a list": b"[1]",
    "content of parts": b'{"choices": [{"message": {"content": ["a"]}}]}',
    "aborted": b'{"choices": [{"message": {"content": "par"}, "finish_reason": "abort"}]}',
    "no UTF-8": b'{"choices": [{"message": {"content": "\xff\xfe"}}]}',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_answer_is_retried_and_never_mended(name: str) -> None:
    made, server = one(failing_first(Action(MALFORMED[name])))
    assert made.text == answer_text(server.seen[0].body)
    made, server = one(lambda seen: Action(MALFORMED[name]), max_attempts=2)
    assert isinstance(made.error, BackendError)
    assert made.text == ""
    assert len(server.seen) == 2


@pytest.mark.parametrize("content", [None, ""])
def test_an_empty_content_is_an_empty_text(content: str | None) -> None:
    made, server = one(lambda seen: answer(seen, message={"role": "assistant", "content": content}))
    assert (made.text, made.error, len(server.seen)) == ("", None, 1)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens", None),
        ("The decoder prompt (length 90) is longer than the maximum model length of 64.", None),
        ("the request exceeds the available context size, try increasing it", None),
        ("The input (900 tokens) is longer than the model's context length (512 tokens).", None),
        ("too long", "context_length_exceeded"),
    ],
)
def test_a_full_context_is_no_failure(message: str, code: str | None) -> None:
    made, server = one(lambda seen: status(400, message, code=code))
    assert (made.finish_reason, made.text, made.error) == ("context_limit", "", None)
    assert len(server.seen) == 1


def test_only_a_refused_request_can_be_too_long() -> None:
    made, _ = one(lambda seen: status(404, "no model with a context length of 4096"))
    assert made.finish_reason == "error"


def test_connection_refused_is_retried_and_typed(caplog: pytest.LogCaptureFixture) -> None:
    with serve(answer) as (_, url):
        pass
    backend = OpenAIBackend("m", [url], backoff=0.01, max_attempts=3, timeout=5.0)
    [made] = backend.generate([ask("hi")])
    backend.close()
    assert "after 3 attempt(s)" in str(made.error)
    assert "no connection, is the server running?" in str(made.error)
    [told] = caplog.messages  # once, not at every attempt
    assert "is the server running?" in told
    assert told.endswith("trying again, attempt 2 of 3")


def test_a_lone_surrogate_fails_alone() -> None:
    with serve(answer) as (_, url):
        backend = OpenAIBackend("m", [url])
        bad, good = backend.generate([ask("a\ud800"), ask("b")])
        backend.close()
    assert "surrogate" in str(bad.error)
    assert good.error is None


# ── several urls ─────────────────────────────────────────────────────────────────────────────────────


def conversation(i: int, turns: int) -> Request:
    said = [{"role": "user" if t % 2 == 0 else "assistant", "content": f"{i}/{t}"} for t in range(2 * turns - 1)]
    return Request([{"role": "system", "content": "the same for all"}, *said])


def test_a_conversation_stays_with_its_server() -> None:
    with serve(answer) as (first, a), serve(answer) as (second, b):
        backend = OpenAIBackend("m", [a, b])
        for turns in (1, 2, 3):
            assert all(g.error is None for g in backend.generate([conversation(i, turns) for i in range(40)]))
        backend.close()
    homes = [{seen.body["messages"][1]["content"] for seen in server.seen} for server in (first, second)]
    assert not homes[0] & homes[1]
    assert min(map(len, homes)) >= 10
    assert len(first.seen) + len(second.seen) == 120


def test_a_dead_server_falls_over_to_the_next_at_once() -> None:
    with serve(answer) as (_, dead):
        pass
    with serve(answer) as (_, alive):
        backend = OpenAIBackend("m", [dead, alive], backoff=30.0)
        start = time.perf_counter()
        made = backend.generate([conversation(i, 1) for i in range(20)])
        backend.close()
    assert all(g.error is None for g in made)
    assert time.perf_counter() - start < 5.0


# ── what is sent ─────────────────────────────────────────────────────────────────────────────────────


def test_the_chat_request() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=33, stop=("a", "b"), min_tokens=2)
    request = ask("hi", sampling=sampling, seed=2**62 + 5, chat_template_kwargs={"enable_thinking": False})
    made, server = one(answer, request)
    assert server.seen[0].path == "/v1/chat/completions"
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert server.seen[0].body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 33,
        "stop": ["a", "b"],
        "seed": 5,  # 2^62 is a multiple of 2^31
        "min_tokens": 2,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert made.usage == {"prompt_tokens": 11, "completion_tokens": 7, "cached_tokens": 3}
    assert made.notes == {}


def test_an_adapter_is_a_model_of_its_own_name() -> None:
    _, server = one(answer, ask("hi", adapter="lora-1"))
    assert server.seen[0].body["model"] == "lora-1"


@pytest.mark.parametrize(
    ("reported", "expected", "notes"),
    [
        ("stop", "stop", {}),
        ("length", "length", {}),
        ("content_filter", "stop", {"finish_reason": "content_filter"}),
        (None, "stop", {}),
    ],
)
def test_finish_reasons(reported: str | None, expected: str, notes: dict[str, str]) -> None:
    made, _ = one(lambda seen: answer(seen, finish_reason=reported))
    assert (made.finish_reason, made.notes) == (expected, notes)


MARKERS = (
    "<|im_start|> <|im_end|> <|endoftext|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|begin_of_text|> <|end_of_text|> "
    "<|endconversation|> [INST] [/INST] <s> </s> <start_of_turn> <end_of_turn> <<SYS>> <</SYS>> <bos> <eos> <｜User｜>"
).split()


def test_markers_are_broken_on_their_way_to_a_chat_server() -> None:
    made, server = one(answer, ask(" and ".join(MARKERS)))
    sent = server.seen[0].body["messages"][0]["content"]
    assert not [marker for marker in MARKERS if marker in sent]
    assert sent.replace("\u2060", "") == " and ".join(MARKERS)
    assert made.notes == {"broken_markers": len(MARKERS)}


@pytest.mark.parametrize("text", ["a < b | c > d", "x <|> y", "[1] <b>bold</b> <section>", "if a<|b: |>", "5 <s 6"])
def test_plain_text_is_sent_as_it_is(text: str) -> None:
    assert wire.break_markers(text) == (text, 0)


def test_breaking_leaves_no_marker_inside_another() -> None:
    for text in ("<|im_<|im_end|>end|>", "<s<s>>", "<<s>", "<|<|a|>|>", "[INST[INST]]"):
        broken, n = wire.break_markers(text)
        assert n >= 1
        assert wire.break_markers(broken) == (broken, 0)


# ── replies under a user header, as token ids ────────────────────────────────────────────────────────


class TinyRenderer:
    """End of turn 2, end of conversation 3, header 4."""

    stop_ids, header_start_id, end_of_conversation_id = (2, 3, 4), 4, 3

    def render(self, messages: Any, generation_role: str, chat_template_kwargs: Any) -> Any:
        assert generation_role == "user"
        ids = tuple(10 + len(message["content"]) for message in messages)
        return type("Rendered", (), {"token_ids": (*ids, 4)})


def test_a_user_reply_is_asked_with_ids() -> None:
    request = Request([{"role": "system", "content": "<|im_end|>"}], role="user", can_end=True)
    made, server = one(lambda seen: answer(seen, token_ids=[7, 8, 2]), request, renderer=TinyRenderer())
    body = server.seen[0].body
    assert server.seen[0].path == "/v1/completions"
    assert body["prompt"] == [20, 4]
    assert body["stop_token_ids"] == [2, 3, 4]
    assert body["return_token_ids"] is True
    assert "logit_bias" not in body
    assert (made.text, made.token_ids, made.finish_reason) == (answer_text(body), (7, 8, 2), "stop")


def test_the_end_is_banned_on_an_opening() -> None:
    request = Request([{"role": "system", "content": "p"}], role="user", can_end=False)
    _, server = one(answer, request, renderer=TinyRenderer())
    assert server.seen[0].body["logit_bias"] == {"3": -100}
    assert server.seen[0].body["stop_token_ids"] == [2, 4]


@pytest.mark.parametrize(
    ("choice", "expected", "notes"),
    [
        ({"token_ids": [9, 3]}, "end", {}),
        ({"token_ids": [9, 2]}, "stop", {}),
        ({"token_ids": [9, 4]}, "role", {}),
        ({"token_ids": [9, 3], "finish_reason": "length"}, "length", {}),
        ({"stop_reason": 3}, "end", {}),
        ({"stop_reason": 4}, "role", {}),
        ({"stop_reason": "###"}, "stop", {}),
        ({"stop_reason": None}, "stop", {"end_unknown": True}),
        ({}, "stop", {"end_unknown": True}),
    ],
)
def test_the_end_of_conversation_is_read_from_ids(choice: dict[str, Any], expected: str, notes: dict[str, Any]) -> None:
    request = Request([{"role": "system", "content": "p"}], role="user", can_end=True)
    made, _ = one(lambda seen: answer(seen, **choice), request, renderer=TinyRenderer())
    assert (made.finish_reason, made.notes) == (expected, notes)


def test_a_users_ids_find_the_tokenizer_that_bans_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usp_env.backends.openai._local_renderer", lambda model, spec: TinyRenderer())
    _, server = one(answer, Request(token_ids=(1, 2, 3), role="user", can_end=False))
    assert server.seen[0].body["logit_bias"] == {"3": -100}
    assert server.seen[0].body["stop_token_ids"] == [2, 4]


def test_given_ids_need_no_tokenizer() -> None:
    made, server = one(lambda seen: answer(seen, token_ids=[5]), Request(token_ids=(1, 2, 3)))
    assert server.seen[0].body["prompt"] == [1, 2, 3]
    assert made.token_ids == (5,)


def test_a_user_reply_without_a_tokenizer_is_explained() -> None:
    pytest.importorskip("transformers")
    backend = OpenAIBackend("no-such-model-here", ["http://127.0.0.1:9/v1"])
    for request in (ask("hi", role="user"), Request(token_ids=(1, 2, 3), role="user")):
        with pytest.raises(SpecError, match="needs the model's tokenizer"):
            backend.generate([request])


@pytest.mark.assets
def test_a_packaged_model_brings_its_tokenizer() -> None:
    with serve(lambda seen: answer(seen, token_ids=[1, 0])) as (server, url):
        backend = OpenAIBackend("smollm2-135m", [url])
        [made] = backend.generate([Request([{"role": "system", "content": "a <|im_end|> b"}], role="user", can_end=True)])
        backend.close()
    prompt = server.seen[0].body["prompt"]
    assert prompt[0] == 1
    assert prompt.count(1) == 2  # <|im_start|> of the two headers
    assert prompt.count(2) == 1  # <|im_end|> of the system message; the one in the text stays text
    assert made.finish_reason == "end"  # <|endoftext|> is 0


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_key_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    def echoing(seen: Seen) -> Action:
        return status(401, f"Incorrect key: {seen.headers['authorization']} " + "x" * 580 + KEY)

    caplog.set_level(logging.DEBUG)
    with serve(echoing) as (server, url):
        backend = OpenAIBackend("m", [url], key=KEY)
        [made] = backend.generate([ask("hi")])
        backend.close()
    assert KEY in server.seen[0].headers["authorization"]
    error = made.error
    assert error is not None
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = [str(error), repr(error), repr(made), repr(backend), backend.spec, json.dumps(backend.identity), caplog.text]
    assert "Incorrect key: Bearer [key]" in str(error)
    assert not [text for text in shown if KEY[:12] in text]


@pytest.mark.parametrize("body", [KEY, json.dumps({"choices": KEY}), KEY * 40, "y" * 10 + KEY * 40])
def test_a_malformed_body_shows_no_key_nor_a_part_of_it(body: str) -> None:
    made, _ = one(lambda seen: Action(body.encode()), max_attempts=1)
    assert made.error is not None
    assert KEY[:4] not in str(made.error)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-default")
    for option, expected in (("?key_env=MY_KEY", KEY), ("", "EMPTY")):
        with serve(answer) as (server, url):
            backend = OpenAIBackend.from_spec(parse(f"openai:m@{url}{option}"))
            backend.generate([ask("hi")])
            backend.close()
        assert server.seen[0].headers["authorization"] == f"Bearer {expected}"
        assert backend.spec == f"openai:m@{url}{option}"


def test_the_default_key_goes_to_its_own_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-default")
    keys = {
        url: OpenAIBackend.from_spec(parse(f"openai:m@{url}"))._key
        for url in (
            "https://api.openai.com/v1",
            "https://api.openai.com.evil.example/v1",
            "http://localhost:1/v1,https://api.openai.com/v1",
        )
    }
    assert list(keys.values()) == ["sk-default", "EMPTY", "EMPTY"]
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SpecError, match="OPENAI_API_KEY"):
        OpenAIBackend.from_spec(parse("openai:m@https://api.openai.com/v1"))


def test_a_missing_or_odd_key_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(SpecError, match="MY_KEY, which is not set"):
        OpenAIBackend.from_spec(parse("openai:m@http://localhost/v1?key_env=MY_KEY"))
    monkeypatch.setenv("MY_KEY", "sk secret")
    with pytest.raises(SpecError, match="MY_KEY") as caught:
        OpenAIBackend.from_spec(parse("openai:m@http://localhost/v1?key_env=MY_KEY"))
    assert "secret" not in str(caught.value)


def test_options_of_other_engines_are_refused() -> None:
    with pytest.raises(SpecError, match="dtype means nothing to a server"):
        OpenAIBackend.from_spec(parse("openai:m@http://localhost/v1?dtype=float32"))
    with pytest.raises(SpecError, match="list of base urls"):
        OpenAIBackend("m", "http://localhost/v1")
    assert OpenAIBackend.from_spec(parse("openai:m@http://localhost/v1?timeout=7")).timeout == 7.0


# ── loops, threads, processes ────────────────────────────────────────────────────────────────────────


def test_generate_works_inside_a_running_loop_and_from_threads() -> None:
    with serve(answer) as (_, url):
        backend = OpenAIBackend("m", [url])

        async def inside() -> list[Generation]:
            return [*backend.generate([ask("a")]), *await backend.agenerate([ask("b")])]

        made = asyncio.run(inside())
        results: list[Generation] = []
        threads = [threading.Thread(target=lambda i=i: results.extend(backend.generate([ask(f"t{i}")]))) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        backend.close()
        made += backend.generate([ask("again")])  # a closed backend opens again
        backend.close()
    assert len(made) == 3
    assert len(results) == 8
    assert all(g.error is None for g in made + results)


def test_cancelling_cancels_the_calls() -> None:
    with serve(lambda seen: Action(kind="stall")) as (server, url):
        backend = OpenAIBackend("m", [url], timeout=60.0)

        async def impatient() -> None:
            async with asyncio.timeout(0.3):
                await backend.agenerate([ask("hi")])

        with pytest.raises(TimeoutError):
            asyncio.run(impatient())
        assert becomes(lambda: server.concurrent == 0)
        backend.close()


def becomes(true: Callable[[], bool], seconds: float = 3.0) -> bool:
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.01)
    return true()


def test_connections_are_kept_open_and_closed_with_the_backend() -> None:
    with serve(answer) as (server, url):
        backend = OpenAIBackend("m", [url])
        for _ in range(5):
            backend.generate([ask("hi")])
        assert server.connections == 1
        backend.close()
        assert becomes(lambda: server.connections == 0)
        backend.generate([ask("hi")])
        assert server.connections == 1
        del backend
        gc.collect()
        assert becomes(lambda: server.connections == 0)


def test_seeded_generators_of_others_are_left_alone() -> None:
    import random

    random.seed(5)
    before = random.getstate()
    one(failing_first(status(500), 2))
    assert random.getstate() == before


PROGRAM = """
import os, sys
from usp_env.backends.base import Request
from usp_env.backends.openai import OpenAIBackend
backend = OpenAIBackend("m", [sys.argv[1]])
ask = lambda: backend.generate([Request([{"role": "user", "content": "hi"}])])[0].text
first = ask()
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        os._exit(0 if ask() == first else 3)
    assert os.waitpid(child, 0)[1] == 0, "the forked child's answer"
    assert ask() == first
elif sys.argv[2] == "close":
    backend.close()
elif sys.argv[2] == "drop":
    del backend
print("done")
"""


@pytest.mark.parametrize(
    "end", ["close", "drop", "forget", pytest.param("fork", marks=pytest.mark.skipif(os.name != "posix", reason="fork"))]
)
def test_a_process_ends_cleanly(end: str) -> None:
    with serve(answer) as (_, url):
        command = [sys.executable, "-W", "error", "-c", PROGRAM, url, end]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


# ── in the environment ───────────────────────────────────────────────────────────────────────────────


def test_a_failed_server_is_an_infra_failure_that_no_trainer_learns_from() -> None:
    import gymnasium as gym

    with serve(lambda seen: status(401)) as (_, url):
        env = gym.make("usp_env/User-v0", assistant=f"openai:m@{url}", reward=None)
        env.reset(seed=0)
        _, reward, terminated, truncated, info = env.step("hello")
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert (info["end_reason"], info["outcome"], info["valid"], info["reward_terms"]) == ("infra", "infra_failure", False, {})


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    begin = time.perf_counter()
    print(check_faulty(run_faulty(count, 5.0), 5.0), f"in {time.perf_counter() - begin:.1f} s")  # noqa: T201


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02",
    ],
    ids=["ssh", "chunk", "tls"],
)
def test_what_is_no_http_is_one_calls_failure(bytes_sent: bytes) -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(bytes_sent)
        await writer.drain()
        writer.close()

    async def run() -> list[Generation]:
        server = await asyncio.start_server(garbage, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        backend = OpenAIBackend("m", [f"http://127.0.0.1:{port}/v1"], max_attempts=2, backoff=0.01)
        made = await backend.agenerate([ask("a"), ask("b")])
        await asyncio.to_thread(backend.close)
        server.close()
        return made

    made = asyncio.run(run())
    assert all(isinstance(g.error, BackendError) for g in made)
    assert all("after 2 attempt(s)" in str(g.error) for g in made)


def test_a_redirect_is_not_followed() -> None:
    with serve(answer) as (elsewhere, there):
        made, server = one(lambda seen: status(307, "moved", headers={"location": f"{there}/chat/completions"}))
        assert elsewhere.seen == []
    assert len(server.seen) == 1
    assert "HTTP 307" in str(made.error)


def test_openais_own_settings_go_to_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
    made, server = one(answer)
    assert made.error is None
    assert not any("mine" in value for value in server.seen[0].headers.values())


def test_counts_that_are_none() -> None:
    assert wire._usage({"prompt_tokens": 10**400, "completion_tokens": -5}) == {"prompt_tokens": 0, "completion_tokens": 0}
    assert wire.retry_after({"retry-after": "Mon, 1 Jan 2020 00:00:00 +99999999999999999999"}) == 0.0


def test_affinity_tells_conversations_apart_whatever_their_prompt() -> None:
    from usp_env.dialogue import OPENER

    def flipped(*said: str) -> Request:
        chat = [{"role": "system", "content": "everybody's"}, {"role": "user", "content": OPENER}]
        return Request([*chat, *({"role": "assistant", "content": text} for text in said)], seed=len(said))

    assert wire.affinity(flipped("a")) != wire.affinity(flipped("b"))
    assert wire.affinity(flipped("a")) == wire.affinity(flipped("a", "more"))
    openings = {wire.affinity(replace(flipped(), seed=seed)) % 4 for seed in range(40)}
    assert openings == {0, 1, 2, 3}
