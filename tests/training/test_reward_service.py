"""The reward service over loopback, with models whose answers depend on the text alone."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("tenacity")
from doubles import Speaker  # noqa: E402
from service_doubles import COOK, Calls, Models, call, health, item, number, running, talk, until  # noqa: E402

from training import reward_scoring, reward_service  # noqa: E402
from usp_env.errors import BackendError, SpecError, UnknownNameError  # noqa: E402
from usp_env.profiles import Profile  # noqa: E402
from usp_env.records import RewardTerms  # noqa: E402
from usp_env.rewards.base import PlainFunction, WeightedSum, register_reward  # noqa: E402
from usp_env.rewards.remote import RemoteReward  # noqa: E402
from usp_env.vector import DialogueVectorEnv  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def remote(port: int, **settings: Any) -> RemoteReward:
    return RemoteReward(f"http://127.0.0.1:{port}", **{"backoff": 0.01, "max_attempts": 3, "timeout": 60.0, **settings})


def same(found: Any, expected: Any) -> None:
    """Equal to the last bit."""
    assert type(found) is type(expected)
    if isinstance(expected, RewardTerms):
        assert dict(found.dialogue) == dict(expected.dialogue)
        assert {k: v.tolist() for k, v in found.utterance.items()} == {k: v.tolist() for k, v in expected.utterance.items()}


# ── values ───────────────────────────────────────────────────────────────────────────────────────


def test_a_remote_reward_is_the_reward() -> None:
    blank = Profile("b", "You cook.", " ")
    sewer = Profile("c", "You sew.", "You ramble.")
    profiles = [COOK, sewer, COOK, blank, COOK, COOK]
    dialogues = [talk("soup?", "with salt"), talk("a hem"), talk("UNREADABLE"), talk("stew"), talk(), talk("DOWN")]
    with running(Models().reward) as (_, port):
        found = remote(port)(profiles, dialogues)
    local = Models().reward().at(final=True)(profiles, dialogues)
    for one, other in zip(found, local, strict=True):
        same(one, other)
    assert [type(terms).__name__ for terms in found] == ["RewardTerms"] * 2 + ["NoneType"] * 3 + ["BackendError"]
    assert "backend_failed: HTTP 500 from the generator" in str(found[5])


def test_equation_6() -> None:
    with running(Models().reward) as (_, port):
        status, body, _ = call(port, item("soup?", "with salt"))
    models = Models()
    (cycle,) = models.reward().parts[0][1]([COOK], [talk("soup?", "with salt")])
    cc, human = cycle.dialogue["cycle"], [number("soup?"), number("with salt")]
    assert status == 200
    assert (body["valid"], body["cc"], body["human"]) == (True, cc, human)
    assert body["utterance_rewards"] == pytest.approx([0.8 * cc + 0.2 * p for p in human], abs=1e-12)
    assert body["reward"] == pytest.approx(0.8 * cc + 0.2 * np.mean(human), abs=1e-12)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (item(), "no user turn"),
        ({**item(), "messages": [{"role": "assistant", "content": "Hello."}]}, "no user turn"),
        (item(" \n", ""), "no user turn: the user said nothing"),
        (item("soup?", subjective="\n "), "the profile's subjective half is blank"),
        (item("soup?", objective="", subjective=""), "the profile's objective and subjective half is blank"),
        (item("UNREADABLE"), "wrote no two paragraphs"),
    ],
)
def test_what_cannot_be_scored_has_no_number(body: Any, reason: str) -> None:
    with running(Models().reward) as (_, port):
        status, found, _ = call(port, body)
    assert (status, set(found), found["valid"]) == (200, {"valid", "reason"}, False)
    assert reason in found["reason"]


def test_a_batch_answers_each_item_for_itself() -> None:
    items = [item("soup?"), item("UNREADABLE"), {"profile": 3}, item("DOWN"), item("a hem")]
    with running(Models().reward) as (service, port):
        status, body, _ = call(port, {"items": items})
        alone = [call(port, one)[1] for one in items]
        assert service.counts == {"scored": 4, "not_scorable": 2, "failed": 2}
        assert call(port, {"items": []})[:2] == (200, {"results": []})
    assert status == 200
    assert body["results"] == alone
    kinds = [found.get("error", {}).get("type") or found["valid"] for found in alone]
    assert kinds == [True, False, "bad_request", "backend_failed", True]


def test_another_expression() -> None:
    def length(profile: Profile, dialogue: Any) -> float | None:
        return None if "UNREADABLE" in dialogue[0].content else float(len(dialogue))

    reward = WeightedSum(((0.5, PlainFunction(length, "length")),))
    with running(lambda: reward) as (_, port):
        body = call(port, item("soup?", "with salt"))[1]
        assert call(port, item("UNREADABLE"))[1] == {"valid": False, "reason": "not scorable by length"}
        assert health(port)["reward"] == "0.5*length"
    assert (body["reward"], body["utterance_rewards"], body["cc"], body["human"]) == (1.5, [1.5, 1.5], None, None)
    assert body["terms"] == {"utterance": {}, "dialogue": {"length": 1.5}}


# ── batches ──────────────────────────────────────────────────────────────────────────────────────


def test_what_waits_is_scored_in_one_call() -> None:
    models = Models()
    with running(models.reward, max_wait_ms=0) as (_, port):
        first = Calls(port, [item("HOLD")])
        assert models.entered.wait(30)
        rest = Calls(port, [item(f"dish {k}") for k in range(10)])
        until(lambda: health(port)["queue"] == 10)
        assert health(port)["busy_seconds"] > 0
        models.gate.set()
        assert [status for status, *_ in first.results() + rest.results()] == [200] * 11
    assert [len(batch) for batch in models.batches] == [1, 1, 10]  # the first warms up
    assert sorted(models.batches[2]) == sorted(f"dish {k}" for k in range(10))


def test_a_batch_waits_for_company() -> None:
    models = Models()
    with running(models.reward, max_wait_ms=60_000, max_batch=3) as (_, port):  # never due but by being full
        Calls(port, [item(f"dish {k}") for k in range(3)]).results()
    assert [len(batch) for batch in models.batches] == [1, 3]
    with running(models.reward, max_wait_ms=30) as (_, port):
        assert call(port, item("alone"))[0] == 200  # though nobody else comes


def test_a_large_request_is_cut_and_put_together() -> None:
    models = Models()
    with running(models.reward, max_batch=4) as (_, port):
        body = call(port, {"items": [item(f"dish {k}") for k in range(10)]})[1]
    said = [f"dish {k}" for k in range(10)]
    assert models.batches[1:] == [said[:4], said[4:8], said[8:]]  # first come, first served
    assert [result["human"] for result in body["results"]] == [[number(f"dish {k}")] for k in range(10)]


def test_64_clients_get_their_own() -> None:
    said = [[f"person {k} says {n}" for n in range(1 + k % 3)] for k in range(64)]
    expected = Models().reward()([COOK] * 64, [talk(*texts) for texts in said])
    found: list[Any] = [None] * 64
    with running(Models().reward, max_batch=7, max_wait_ms=1) as (service, port):

        def one(k: int) -> None:
            found[k] = [remote(port)([COOK], [talk(*said[k])])[0] for _ in range(2)]

        threads = [threading.Thread(target=one, args=(k,)) for k in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert service.counts["scored"] == 128
    assert len({json.dumps(terms.flat) for terms in expected}) == 64
    for pair, terms in zip(found, expected, strict=True):
        same(pair[0], terms)
        same(pair[1], terms)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_refuses_and_says_when() -> None:
    models = Models()
    with running(models.reward, queue=2, max_wait_ms=0) as (_, port):
        calls = [Calls(port, [item("HOLD")])]
        assert models.entered.wait(30)
        calls.append(Calls(port, [item("one"), item("two")]))
        until(lambda: health(port)["queue"] == 2)
        status, body, headers = call(port, item("three"))
        assert (status, body["error"]["type"]) == (503, "queue_full")
        assert "got 2 of 2 waiting" in body["error"]["message"]
        assert 1 <= int(headers["retry-after"]) <= 60
        too_many = call(port, {"items": [item("a")] * 3})
        assert (too_many[0], too_many[1]["error"]["type"]) == (413, "too_large")
        assert "at most 2, got 3" in too_many[1]["error"]["message"]
        models.gate.set()
        assert [status for each in calls for status, *_ in each.results()] == [200] * 3
        assert call(port, item("three"))[0] == 200
    assert "three" not in models.batches[1] + models.batches[2]


def test_a_client_waits_for_room() -> None:
    models = Models()
    with running(models.reward, queue=1, max_wait_ms=0) as (_, port):
        held = [Calls(port, [item("HOLD")])]
        assert models.entered.wait(30)
        held.append(Calls(port, [item("one")]))
        until(lambda: health(port)["queue"] == 1)
        box: list[Any] = []
        thread = threading.Thread(target=lambda: box.append(remote(port, max_attempts=20)([COOK], [talk("two")])))
        thread.start()
        (error,) = remote(port, max_attempts=1)([COOK], [talk("three")])
        models.gate.set()
        thread.join(60)
        [each.results() for each in held]
    assert isinstance(error, BackendError)
    assert "after 1 attempt(s): HTTP 503: queue_full: expected room" in str(error)
    same(box[0][0], Models().reward()([COOK], [talk("two")])[0])


SAID = [{"role": "user", "content": "soup?"}]
GOOD = {"objective": "You cook.", "subjective": "You are terse."}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected one JSON object, got 0 bytes"),
        (b"soup", "expected one JSON object, got 4 bytes"),
        (b'{"profile": ', "expected one JSON object"),
        (b"\xff\xfe\xfd", "expected one JSON object, got 3 bytes"),
        (b"[" * 100_000, "expected one JSON object"),
        (b"9" * 5000, "expected one JSON object"),
        ([GOOD], "expected a JSON object with 'profile' and 'messages', or 'items', got list"),
        ({}, "profile: expected an object with 'objective' and 'subjective', got nothing"),
        ({"profile": "You cook.", "messages": SAID}, "got str 'You cook.'"),
        ({"profile": {"objective": "You cook."}, "messages": SAID}, "profile.subjective: expected a string, got nothing"),
        ({"profile": {**GOOD, "objective": 3}, "messages": SAID}, "profile.objective: expected a string, got int 3"),
        ({"profile": GOOD}, "messages: expected a list of objects with 'role' and 'content', got nothing"),
        ({"profile": GOOD, "messages": "soup?"}, "messages: expected a list"),
        ({"profile": GOOD, "messages": ["soup?"]}, "message 0: expected a role 'user' or 'assistant'"),
        ({"profile": GOOD, "messages": [*SAID, {"role": "system", "content": "x"}]}, "message 1: expected a role"),
        ({"profile": GOOD, "messages": [{"role": "user", "content": None}]}, "a content string, got"),
        ({"profile": GOOD, "messages": [{"role": "user", "content": "a\ud800"}]}, "lone surrogate at character 2"),
        ({"profile": {**GOOD, "subjective": "\udfff"}, "messages": SAID}, "profile.subjective: expected valid Unicode"),
        ({"items": {}}, "items: expected a list of items, got dict"),
    ],
)
def test_bad_bodies(body: Any, message: str) -> None:
    models = Models()
    with running(models.reward) as (_, port):
        status, found, _ = call(port, body)
        assert (status, found["error"]["type"]) == (400, "bad_request")
        assert message in found["error"]["message"]
        if not isinstance(body, bytes) and "items" not in body:
            (result,) = call(port, {"items": [body]})[1]["results"]
            assert result["error"]["type"] == "bad_request"
        assert call(port, item("soup?"))[0] == 200
    assert len(models.batches) == 2


def test_other_content_types_and_other_keys_are_tolerated() -> None:
    body = json.dumps({**item("soup?"), "id": 7, "model": "x"}).encode()
    with running(Models().reward) as (_, port):
        found = [call(port, body, content_type=kind)[:2] for kind in ("application/json", "text/plain", "image/png", "")]
    assert found[0][0] == 200
    assert found == found[:1] * 4


def test_sizes_paths_and_methods() -> None:
    with running(Models().reward, max_body=2000) as (_, port):
        status, body, _ = call(port, item("s" * 3000))
        assert (status, body["error"]["type"]) == (413, "too_large")
        assert "at most 2000 bytes" in body["error"]["message"]
        assert call(port, item("s" * 1000))[0] == 200
        status, body, _ = call(port, item("soup?"), "/rewards")
        assert (status, body["error"]["type"]) == (404, "not_found")
        assert "POST /rewards" in body["error"]["message"]
        status, body, headers = call(port, None, "/reward", "GET")
        assert (status, body["error"]["type"], headers["allow"]) == (405, "method_not_allowed", "POST")
        assert call(port, item("soup?"), "/health")[0] == 405


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


def test_an_exception_is_its_own_items() -> None:
    models = Models()
    with running(models.reward) as (service, port):
        status, body, _ = call(port, {"items": [item("soup?"), item("CRASH"), item("a hem")]})
        assert (status, service.state) == (200, "ready")
        assert [set(result) for result in body["results"]][1] == {"error"}
        assert [result.get("valid") for result in body["results"]] == [True, None, True]
        status, found, _ = call(port, item("CRASH"))
        assert (status, found["error"]["type"]) == (500, "reward_failed")
        assert "the reward raised ValueError" in found["error"]["message"]
        assert call(port, item("soup?"))[:2] == (200, body["results"][0])


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration("x"), KeyboardInterrupt()])
def test_nothing_that_a_reward_raises_ends_the_service(error: BaseException) -> None:
    def raises(profile: Profile, dialogue: Any) -> float:
        if "CRASH" in dialogue[0].content:
            raise error
        return 1.0

    with running(lambda: WeightedSum(((1.0, PlainFunction(raises, "raises")),))) as (_, port):
        status, body, _ = call(port, item("CRASH"))
        assert (status, body["error"]["type"]) == (500, "reward_failed")
        assert type(error).__name__ in body["error"]["message"]
        assert call(port, item("soup?"))[0] == 200


@pytest.mark.parametrize("word", ["DOWN", "LOST"])
def test_a_model_that_fails_is_502(word: str) -> None:
    with running(Models().reward) as (_, port):
        status, body, _ = call(port, item(word))
        assert (status, body["error"]["type"]) == (502, "backend_failed")
        (error,) = remote(port)([COOK], [talk(word)])
        assert isinstance(error, BackendError)
        assert "after 3 attempt(s): backend_failed: " in str(error)
        assert call(port, item("soup?"))[0] == 200


def test_contents_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="asyncio")
    secret = "my key is sk-12345"
    with running(Models().reward) as (_, port):
        for word in ("", "CRASH", "LOST", "DOWN", "UNREADABLE"):
            call(port, item(f"{word} {secret}"))
            call(port, {"profile": secret})
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(f"{secret} HTTP/9\r\n\r\n".encode())
            raw.recv(1000)
    assert "the reward raised ValueError" in caplog.text
    assert "service_doubles.py" in caplog.text  # where
    assert "sk-12345" not in caplog.text


def test_what_is_no_number_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    with running(Models().reward) as (service, port):
        service.models = {"x": float("nan")}
        status, body, _ = call(port, None, "/health", "GET")
        assert (status, body["error"]) == (500, {"type": "reward_failed", "message": "the service raised ValueError"})
    assert "a handler raised ValueError" in caplog.text


def test_who_hangs_up_leaves_the_queue() -> None:
    models = Models()
    raw = json.dumps(item("gone")).encode()
    with running(models.reward, max_wait_ms=0) as (_, port):
        held = Calls(port, [item("HOLD")])
        assert models.entered.wait(30)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /reward HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
            until(lambda: health(port)["queue"] == 1)
        until(lambda: health(port)["queue"] == 0)
        stays = Calls(port, [item("stays")])
        until(lambda: health(port)["queue"] == 1)
        models.gate.set()
        assert held.results()[0][0] == stays.results()[0][0] == 200
    assert models.batches[1:] == [["HOLD"], ["stays"]]


# ── beginning and end ────────────────────────────────────────────────────────────────────────────


def test_ready_once_the_models_are_loaded() -> None:
    models, loaded = Models(), threading.Event()

    def make() -> WeightedSum:
        loaded.wait(15)
        return models.reward()

    with running(make, wait=False) as (service, port):
        status, body, _ = call(port, None, "/health", "GET")
        assert (status, body["state"], body["reward"]) == (503, "loading", None)
        status, body, headers = call(port, item("soup?"))
        assert (status, body["error"]["type"], headers["retry-after"]) == (503, "loading", "2")
        assert call(port, b"soup")[0] == 400
        loaded.set()
        until(lambda: service.state == "ready")
        status, body, _ = call(port, None, "/health", "GET")
        assert (status, body["state"], body["reward"], body["scored"]) == (200, "ready", "0.8*cycle + 0.2*human", 0)
        assert body["models"] == {"cycle": {"generator": "Models", "embedder": "method"}, "human": {"scorer": "method"}}
        assert remote(port).identity == {"reward": body["reward"], "models": body["models"]}
        assert call(port, item("soup?"))[0] == 200
        assert health(port)["scored"] == 1


def _answers(port: int) -> bool:
    try:
        return bool(health(port))
    except ConnectionRefusedError:
        return False


def test_a_reward_that_cannot_be_made_ends_it() -> None:
    def make() -> WeightedSum:
        return reward_scoring.open_reward("nobody")

    with pytest.raises(UnknownNameError, match="unknown reward 'nobody'"), running(make):
        pass


def test_what_is_queued_is_finished_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_service, "_WRITING", 0.05)
    models = Models()
    with running(models.reward, max_wait_ms=0) as (_, port):
        calls = [Calls(port, [item("HOLD")])]
        assert models.entered.wait(30)
        calls.append(Calls(port, [item("two")]))
        until(lambda: health(port)["queue"] == 1)
        threading.Timer(1.0, models.gate.set).start()
    assert [status for each in calls for status, *_ in each.results()] == [200, 200]


WAITS = """
import pathlib, time
def waits(profile, dialogue):
    while "HOLD" in dialogue[0].content and not pathlib.Path(__file__).with_name("go").exists():
        time.sleep(0.01)
    return float(len(dialogue[0].content))
"""


@pytest.fixture
def program(tmp_path: Path) -> Any:
    (tmp_path / "waits.py").write_text(WAITS, "utf-8")
    command = [sys.executable, "-m", "training.reward_service", "--reward", "waits:waits", "--port", "0", "--max-batch", "1"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    started = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | paths, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield started
    if started.poll() is None:
        started.kill()
    started.communicate()


def test_sigterm_finishes_what_is_queued(program: Any, tmp_path: Path) -> None:
    ready = program.stdout.readline()
    assert ready.startswith("ready: http://127.0.0.1:")
    port = int(ready.split("/reward")[0].rpartition(":")[2])
    calls = Calls(port, [item("HOLD"), item("HOLD two"), item("HOLD number three")])
    until(lambda: health(port)["queue"] == 2)
    program.send_signal(signal.SIGTERM)
    until(lambda: not _answers(port))  # nothing new gets in
    assert program.poll() is None
    (tmp_path / "go").touch()
    assert [(status, body["reward"]) for status, body, _ in calls.results()] == [(200, 4.0), (200, 8.0), (200, 17.0)]
    assert program.wait(30) == 0
    assert program.stdout.read() == "stopped: 3 scored, 0 not scorable, 0 failed\n"


def test_a_second_sigterm_ends_at_once(program: Any) -> None:
    port = int(program.stdout.readline().split("/reward")[0].rpartition(":")[2])
    calls = Calls(port, [])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        raw = json.dumps(item("HOLD")).encode()
        connection.sendall(b"POST /reward HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
        until(lambda: health(port)["busy_seconds"] > 0)
        program.send_signal(signal.SIGTERM)
        until(lambda: not _answers(port))
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == -signal.SIGTERM
    calls.results()


# ── the program ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambda", "1.5"], "lambda: expected a number in [0, 1], got 1.5"),
        (["--lambda", "nan"], "lambda: expected a number in [0, 1], got nan"),
        (["--reward", "goal"], "reward 'goal' scores the assistant's answers"),
        (["--reward", "politeness_of_nobody"], "unknown reward"),
        (["--reward", "human", "--generator", "smollm2-135m"], "belong to its part 'cycle'"),
        (["--max-batch", "0"], "expected max_batch ≥ 1"),
    ],
)
def test_wrong_options_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reward_service.main([*arguments, "--port", "0"]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert reward_service.main(["--port", str(port), "--reward", "human"]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_lambda_is_an_expression() -> None:
    found = [reward_scoring.expression(lam) for lam in (0.8, 0.85, 0.0, 1.0)]
    assert found == ["0.8*cycle+0.2*human", "0.85*cycle+0.15*human", "0*cycle+1*human", "1*cycle+0*human"]
    with pytest.raises(SpecError, match="lambda"):
        reward_scoring.expression(-0.1)


def test_generator_and_embedder_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    models, named = Models(), []
    monkeypatch.setattr("usp_env.extraction.generator.load_generator", lambda spec: named.append(spec) or models)
    monkeypatch.setattr("usp_env.models.embedders.load", lambda name: named.append(name) or models.embed)
    monkeypatch.setattr("usp_env.models.scorers.load", lambda name: models.human)
    reward = reward_scoring.open_reward("0.8*cycle+0.2*human", "some/Generator", "simcse")
    assert set(named) == {"some/Generator", "simcse"}
    same(reward([COOK], [talk("soup?")])[0], Models().reward()([COOK], [talk("soup?")])[0])
    named.clear()
    reward_scoring.open_reward("cycle")
    assert set(named) == {"profile-generator", "auto"}


# ── environments ─────────────────────────────────────────────────────────────────────────────────


def lanes(sampler: object, reward: Any) -> DialogueVectorEnv:
    settings = {"population": "uniform", "max_turns": 1, "autoreset_mode": "Disabled"}
    assistant = Speaker(lambda view, seed: "Yes?", role="assistant")
    envs = DialogueVectorEnv(3, assistant, sampler, reward, "user", **settings)
    envs.reset(seed=5)
    return envs


def test_an_environment_is_paid_by_the_service(sampler: object) -> None:
    said = ["soup?", "UNREADABLE", "a hem"]
    local = lanes(sampler, Models().reward()).step(said)
    with running(Models().reward) as (service, port):
        distant = lanes(sampler, remote(port)).step(said)
        register_reward("far", remote(port))
        halved = lanes(sampler, "0.5*far").step(said)
        assert service.batcher.batches == 2  # one request and one call of the reward for three lanes
    np.testing.assert_array_equal(distant[1], local[1])
    np.testing.assert_allclose(halved[1], 0.5 * local[1])
    for key in ("outcome", "end_reason", "valid", "utterance_rewards", "reward_terms"):
        assert list(distant[4][key]) == list(local[4][key])
    assert list(distant[4]["outcome"]) == ["completed", "unscored", "completed"]


def test_a_service_that_does_not_answer_in_time_is_an_infra_failure(sampler: object) -> None:
    models = Models()
    with running(models.reward) as (_, port):
        *_, infos = lanes(sampler, remote(port, timeout=0.3)).step(["soup?", "HOLD", "a hem"])
        models.gate.set()
    assert list(infos["outcome"]) == ["infra_failure"] * 3
    assert list(infos["end_reason"]) == ["infra"] * 3
    assert not infos["valid"].any()


def test_a_timeout_says_so() -> None:
    models = Models()
    with running(models.reward) as (_, port):
        (error,) = remote(port, timeout=0.3)([COOK], [talk("HOLD")])
        until(lambda: health(port)["queue"] == 0)
        models.gate.set()
    assert isinstance(error, BackendError)
    expected = f"reward service http://127.0.0.1:{port}: the call failed after 1 attempt(s): no answer within 0.3 s"
    assert str(error) == expected


@pytest.mark.assets
def test_the_packaged_models_over_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_service, "WARM_UP", reward_service.Item(COOK, talk()))  # no generation for nothing
    local = reward_scoring.open_reward(reward_scoring.expression(0.8))
    asked = [COOK, COOK], [talk("whats a good soup", "ok and without onions"), talk()]
    with running(lambda: local) as (_, port):
        found = remote(port)(*asked)
        identity = remote(port).identity
    for one, other in zip(found, local(*asked), strict=True):
        same(one, other)
    assert isinstance(found[0], RewardTerms)
    assert found[0].utterance["human"].shape == (2,)
    assert len(identity["models"]["cycle"]["generator"]["backend"]["weights"]) == 64
    assert identity["models"]["human"] == {"scorer": "human-v1"}
