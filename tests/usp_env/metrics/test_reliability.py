"""Whether a detector's probabilities come true: texts of one length, bins, calibration error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from usp_env.dialogue import Dialogue
from usp_env.metrics.reliability import TOLERANCE, bins_of, ece, length_matched, matched, prefixes, share_interval


def talk(turn: str, reply: str) -> Dialogue:
    return Dialogue.of([{"role": "user", "content": turn}, {"role": "assistant", "content": reply}])


def test_prefixes_end_with_sentences() -> None:
    assert prefixes("One. Two:\nthree") == ["One.", "One. Two:", "One. Two:\nthree"]


def test_a_user_turn_is_never_matched_with_its_own_conversation() -> None:
    # Its own reply is of the same length; the other's, of 10 characters to 8, is log 1.25 = .223 away: too far.
    pool, rng = [("a", "12345678"), ("b", "1234567890")], np.random.default_rng(0)
    assert [matched(rng, pool, "87654321", "a") for _ in range(20)] == [None] * 20
    assert matched(rng, pool, "987654321", "a") == ("b", "1234567890")  # log(10/9) = .105
    assert matched(rng, pool[:1], "87654321", "a") is None


def test_people_and_assistants_come_in_pairs_of_one_length() -> None:
    long = "This sentence has some forty characters. " * 4
    talks = {"a": talk("x" * 41, long), "b": talk("y" * 80, long), "c": talk("z" * 9, "Hm"), "d": talk(" ", "")}
    found = length_matched(talks)
    assert [(one.cluster, one.human) for one in found[::2]] == [("a", True), ("b", True)]  # nothing is as short as c's
    for person, assistant in zip(found[::2], found[1::2], strict=True):
        assert not assistant.human
        assert assistant.cluster != person.cluster
        assert abs(math.log(len(assistant.text) / len(person.text))) <= TOLERANCE
    assert found == length_matched(talks)
    assert length_matched({"a": talk("hello there", "hello there")}) == []
    assert length_matched({"d": talk("hello", "")}) == []


def test_bins_by_hand() -> None:
    p, y = np.array([0.05, 0.1, 0.19, 0.95, 1.0]), np.array([False, True, False, True, True])
    low, second, last = bins_of(p, y, ["a", "a", "b", "b", "c"])
    assert (low.low, low.high, low.n, low.predicted, low.share) == (0, 0.1, 1, 0.05, 0)  # an edge belongs to the bin above it
    assert (second.low, second.high, second.n, second.share) == (0.1, 0.2, 2, 0.5)
    assert second.predicted == pytest.approx(0.145)
    assert (last.low, last.high, last.n, last.share) == (0.9, 1, 2, 1)  # and 1 to the last
    assert last.predicted == pytest.approx(0.975)
    # |.05 - 0| 1/5 + |.145 - .5| 2/5 + |.975 - 1| 2/5
    assert ece(p, y) == pytest.approx(0.01 + 0.142 + 0.01)
    assert ece(p, y) == pytest.approx(sum(one.n * abs(one.predicted - one.share) for one in (low, second, last)) / 5)


def test_ece() -> None:
    # bin [.9, 1]: two at .95, one of them true -> |1.9 − 1|; bin [.1, .2): .15, false -> .15; Σ/n = (.9 + .15)/3
    assert ece(np.array([0.95, 0.95, 0.15]), np.array([1, 0, 0])) == pytest.approx(0.35)
    assert ece(np.array([1.0, 0.0]), np.array([1, 0])) == 0


def test_intervals_of_shares_by_hand() -> None:
    z = 1.959964
    # Each text its own conversation, half of 4: variance 4/3 · 4 · .25 / 16 = 1/12, n' = .25 · 12 = 3
    half = z * math.sqrt(0.25 / 3 + z**2 / 36) / (1 + z**2 / 3)
    assert share_interval(np.array([1, 0, 1, 0]), list("abcd")) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    # Two conversations that say the opposite: variance 2 · (1 + 1) / 16 = 1/4, n' = 1, whatever the number of their texts
    half = z * math.sqrt(0.25 + z**2 / 4) / (1 + z**2)
    assert share_interval(np.array([1, 1, 0, 0]), list("aabb")) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    # Conversations that agree to the last text tell no more than their texts do: n' = 4
    half = z * math.sqrt(0.25 / 4 + z**2 / 64) / (1 + z**2 / 4)
    assert share_interval(np.array([1, 0, 1, 0]), list("aabb")) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_a_share_of_all_or_none_is_not_certain() -> None:
    assert share_interval(np.zeros(9), list("aaabbbccc")) == pytest.approx((0, 1.959964**2 / (3 + 1.959964**2)), abs=1e-6)
    assert share_interval(np.ones(9), ["a"] * 9)[0] == pytest.approx(1 / (1 + 1.959964**2), abs=1e-6)
    assert share_interval(np.array([1, 0]), ["a", "a"])[1] > 0.9  # one conversation


def test_intervals_cover_what_conversations_have_in_common() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):  # 30 conversations of 6 texts, each with a share of its own, about .7
        shares = rng.beta(2.1, 0.9, 30)
        labels = (rng.random((30, 6)) < shares[:, None]).ravel()
        low, high = share_interval(labels, [str(k // 6) for k in range(180)])
        hits += low <= 0.7 <= high
    assert 0.91 <= hits / 300 <= 0.99
