"""`RemoteReward` against a server on loopback that fails as it is told to."""

from __future__ import annotations

import copy
import json
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("tenacity")
sys.path.append(str(Path(__file__).parent.parent / "backends"))
from faulty_server import Action, Seen, serve, status  # noqa: E402

from usp_env.dialogue import Dialogue  # noqa: E402
from usp_env.errors import BackendError, SpecError  # noqa: E402
from usp_env.profiles import Profile  # noqa: E402
from usp_env.records import RewardTerms  # noqa: E402
from usp_env.rewards import wire  # noqa: E402
from usp_env.rewards.base import RewardFunction, make_reward, register_reward  # noqa: E402
from usp_env.rewards.remote import RemoteReward  # noqa: E402

COOK = Profile("a", "You cook.", "You are terse.")
LINGER: Any = {"timeout": 30.0, "max_attempts": 3, "backoff": 0.01}
HEALTH = {"state": "ready", "reward": "0.8*cycle + 0.2*human", "models": {"human": {"scorer": "human-v1"}}}


def talk(*said: str) -> Dialogue:
    return Dialogue.of({"role": "user", "content": text} for text in said)


def result(item: Mapping[str, Any]) -> dict[str, Any]:
    """A utterance is worth its length."""
    said = [message["content"] for message in item["messages"]]
    if "unscorable" in said:
        return {"valid": False, "reason": "no two paragraphs"}
    return {"valid": True, "terms": {"utterance": {"human": [len(text) for text in said]}, "dialogue": {"cycle": 0.5}}}


def good(seen: Seen) -> Action:
    if seen.path.endswith("/health"):
        return Action(json.dumps(HEALTH).encode())
    assert seen.path.endswith("/reward")
    return Action(json.dumps({"results": [result(item) for item in seen.body["items"]]}).encode())


def first(action: Action) -> Callable[[Seen], Action]:
    """Fails the first attempt of every request."""
    return lambda seen: good(seen) if seen.attempt else action


def score(respond: Callable[[Seen], Action], *said: str, **settings: Any) -> tuple[list[Any], list[Seen]]:
    with serve(respond) as (server, url):
        found = RemoteReward(url, **{**LINGER, **settings})([COOK] * len(said), [talk(text) for text in said])
    return found, server.seen


def failure(respond: Callable[[Seen], Action], *said: str, **settings: Any) -> tuple[str, int]:
    """Message and number of attempts."""
    (error,), seen = score(respond, *(said or ("soup?",)), **settings)
    assert isinstance(error, BackendError)
    assert str(error).startswith("reward service http://127.0.0.1:")
    return str(error), len(seen)


# ── what comes back ──────────────────────────────────────────────────────────────────────────────


def test_terms() -> None:
    (terms, unscored), seen = score(good, "soup?", "unscorable")
    assert (terms.dialogue, terms.utterance["human"].tolist(), unscored) == ({"cycle": 0.5}, [5.0], None)
    assert seen[0].body == {
        "items": [
            {
                "profile": {"objective": "You cook.", "subjective": "You are terse."},
                "messages": [{"role": "user", "content": text}],
            }
            for text in ("soup?", "unscorable")
        ]
    }


def test_nothing_is_asked_about_nothing() -> None:
    assert score(good) == ([], [])


def test_many_go_in_several_requests_and_keep_their_order() -> None:
    said = [f"{'x' * k}" for k in range(1, 8)]
    found, seen = score(good, *said, max_items=3)
    assert [terms.utterance["human"].tolist() for terms in found] == [[float(k)] for k in range(1, 8)]
    assert sorted(len(each.body["items"]) for each in seen) == [1, 3, 3]


def test_what_was_sent_can_be_read() -> None:
    dialogue = Dialogue.of([{"role": "user", "content": "süß\n\x00?"}, {"role": "assistant", "content": "Ja."}])
    item = wire.read_item(json.loads(json.dumps(wire.item_json(COOK, dialogue))))
    assert item.dialogue == dialogue
    assert (item.profile.objective, item.profile.subjective) == (COOK.objective, COOK.subjective)
    other = wire.read_item(wire.item_json(Profile("a", "You cook.You", " are terse."), dialogue))
    assert other.profile.id != item.profile.id  # people are not mixed up


def test_it_is_a_reward() -> None:
    with serve(good) as (_, url):
        reward = RemoteReward(url, **LINGER)
        assert isinstance(reward, RewardFunction)
        assert (reward.name, reward.when) == ("remote", "end")
        assert pickle.loads(pickle.dumps(reward)) == copy.deepcopy(reward) == reward
        register_reward("distant", reward)
        made = make_reward("0.5*distant", "user")
        assert made is not None
        (terms,) = made([COOK], [talk("soup?")])
        assert isinstance(terms, RewardTerms)
        assert (dict(terms.dialogue), terms.credit(1)) == ({"cycle": 0.25}, [2.75])
        assert dict(made.identity) == {"remote": {"reward": HEALTH["reward"], "models": HEALTH["models"]}}


# ── what is tried again ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "action",
    [status(502), status(503), status(503, "later", {"retry-after": "0.05"}), Action(kind="reset")],
    ids=["502", "503", "retry-after", "reset"],
)
def test_passing_faults(action: Action) -> None:
    (terms,), seen = score(first(action), "soup?")
    assert terms.dialogue == {"cycle": 0.5}
    assert len(seen) == 2


def test_a_body_that_breaks_off_is_a_lost_connection() -> None:
    def serve_halves() -> None:
        for _ in range(LINGER["max_attempts"]):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_halves)
        thread.start()
        (error,) = RemoteReward(f"http://127.0.0.1:{listener.getsockname()[1]}", **LINGER)([COOK], [talk("soup?")])
        thread.join(30)
    assert "failed after 3 attempt(s): connection lost, is the service running? (ClientPayloadError" in str(error)


def test_the_pause_is_as_long_as_the_server_asks() -> None:
    began = time.monotonic()
    score(first(status(503, "later", {"retry-after": "0.4"})), "soup?")
    assert time.monotonic() - began >= 0.4


def test_only_the_items_that_failed_are_asked_again() -> None:
    def respond(seen: Seen) -> Action:
        results = json.loads(good(seen).body)["results"]
        for k, item in enumerate(seen.body["items"]):
            if item["messages"][0]["content"] == "down" and len(seen.body["items"]) > 1:
                results[k] = wire.Failure("backend_failed", "HTTP 500").to_json()
        return Action(json.dumps({"results": results}).encode())

    found, seen = score(respond, "soup?", "down", "unscorable")
    assert [terms and terms.utterance["human"].tolist() for terms in found] == [[5.0], [4.0], None]
    assert [len(each.body["items"]) for each in seen] == [3, 1]


def test_attempts_have_an_end() -> None:
    message, attempts = failure(lambda seen: status(503, "busy", type="queue_full"))
    assert attempts == 3
    assert message.endswith("the call failed after 3 attempt(s): HTTP 503: queue_full: busy")
    message, attempts = failure(lambda seen: Action(kind="reset"))
    assert attempts == 3
    assert "connection lost, is the service running?" in message


def test_no_server() -> None:
    (error,) = RemoteReward("http://127.0.0.1:9", **LINGER)([COOK], [talk("soup?")])
    assert isinstance(error, BackendError)
    assert "failed after 3 attempt(s): connection lost, is the service running? (ClientConnectorError" in str(error)


# ── what is final ────────────────────────────────────────────────────────────────────────────────


def answers(value: Any) -> Callable[[Seen], Action]:
    return lambda seen: Action(json.dumps(value).encode())


def of_terms(utterance: Any, dialogue: Any) -> Callable[[Seen], Action]:
    return answers({"results": [{"valid": True, "terms": {"utterance": utterance, "dialogue": dialogue}}]})


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (lambda seen: status(400, "expected a profile", type="bad_request"), "HTTP 400: bad_request: expected a profile"),
        (lambda seen: status(500, "ValueError", type="reward_failed"), "HTTP 500: reward_failed: ValueError"),
        (lambda seen: Action(b"Not Found", 404), "HTTP 404: Not Found"),
        (lambda seen: Action(b"", 504), "HTTP 504: (no body)"),
        (lambda seen: Action(b"", 307, {"location": "http://elsewhere/reward"}), "HTTP 307"),
        (lambda seen: Action(b'{"results": [{"val'), "expected JSON, got"),
        (lambda seen: Action(b"[" * 50_000), "expected JSON, got"),
        (answers({"results": []}), "expected an object with 'results', one for each of 1 items, got 0 results"),
        (answers([1]), "expected an object with 'results', one for each of 1 items, got list [1]"),
        (answers({"results": [3]}), "expected a result with 'terms', got int 3"),
        (answers({"results": [{"valid": True, "reward": 0.5}]}), "expected a result with 'terms'"),
        (of_terms([0.1], {}), "expected a result with 'terms'"),
        (of_terms({}, {}), "expected a result with 'terms'"),
        (of_terms({"human": [0.1, 0.2]}, {}), "expected vectors of 1 finite numbers"),
        (of_terms({"human": [float("nan")]}, {}), "expected vectors of 1 finite numbers"),
        (of_terms({"human": ["1"]}, {}), "expected vectors of 1 finite numbers"),
        (of_terms({}, {"cycle": float("inf")}), "expected finite terms"),
        (of_terms({}, {"cycle": 10**400}), "expected finite terms"),
        (of_terms({}, {"cycle": True}), "expected finite terms"),
        (answers({"results": [wire.Failure("reward_failed", "ValueError").to_json()]}), ": reward_failed: ValueError"),
        (answers({"results": [wire.Failure("bad_request", "no").to_json()]}), ": bad_request: no"),
    ],
)
def test_final_faults_fail_at_once(respond: Callable[[Seen], Action], message: str) -> None:
    told, attempts = failure(respond)
    assert message in told
    assert attempts == 1


@pytest.mark.parametrize("kind", ["stall", "stall_body"])
def test_the_deadline_is_hard(kind: Any) -> None:
    began = time.monotonic()
    message, attempts = failure(lambda seen: Action(good(seen).body, kind=kind), timeout=0.3)
    assert time.monotonic() - began < 5
    assert message.endswith("the call failed after 1 attempt(s): no answer within 0.3 s")
    assert attempts == 1


def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    began = time.monotonic()
    message, _ = failure(lambda seen: status(503, "later", {"retry-after": "60"}, type="queue_full"))
    assert time.monotonic() - began < 5
    assert "HTTP 503: queue_full: later" in message


def test_what_was_answered_before_the_deadline_stays() -> None:
    def respond(seen: Seen) -> Action:
        return Action(kind="stall") if "slow" in json.dumps(seen.body) else good(seen)

    (fast, slow), _ = score(respond, "soup?", "slow", max_items=1, timeout=0.5)
    assert fast.dialogue == {"cycle": 0.5}
    assert isinstance(slow, BackendError)


def test_an_unready_service_has_no_identity() -> None:
    with serve(lambda seen: status(503, "loading", type="loading")) as (_, url), pytest.raises(BackendError, match="loading"):
        RemoteReward(url, **LINGER).identity  # noqa: B018
    with serve(answers({"status": "ok"})) as (_, url), pytest.raises(BackendError, match="expected the health of a reward"):
        RemoteReward(url, **LINGER).identity  # noqa: B018


@pytest.mark.parametrize(
    "url",
    ["", "localhost:5000", "ftp://x", "http://", "http://h:x", "http://[h", "http://me:secret@host", "http://host?key=secret"],
)
def test_a_url_is_checked_and_not_quoted(url: str) -> None:
    with pytest.raises(SpecError, match="expected a url such as") as caught:
        RemoteReward(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["timeout", "max_attempts", "max_items", "backoff"])
def test_numbers_are_checked(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name}: expected more than 0, got 0"):
        RemoteReward("http://host", **{name: 0})
