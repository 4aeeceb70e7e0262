from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usp_env.errors import SpecError
from usp_env.metrics.lexical import distinct_n, hdd, mattr, word_tokens, yules_k

WORDS = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=12)


def test_words_have_no_case_and_no_marks():
    assert word_tokens(["Don't STOP — naïve_x!", "", "Straße 42 🍲", "..."]) == ["don't", "stop", "naïve", "x", "strasse", "42"]


def test_mattr_by_hand():
    # Windows of 3 in "a b a c c": aba 2/3, bac 1, acc 2/3.
    assert mattr([["a b a", "C c"]], window=3) == pytest.approx([7 / 9])
    assert mattr([["a a a a"]], window=1) == pytest.approx([1])
    assert mattr([["a " * 50], ["a " * 49], []])[0] == pytest.approx(1 / 50)
    assert np.isnan(mattr([["a " * 49], [], ["", "!!"]])).all()  # too short is no number
    with pytest.raises(SpecError, match="window"):
        mattr([["a"]], window=0)


@given(WORDS, st.integers(1, 5))
def test_mattr_is_the_mean_over_windows(words, window):
    expected = [len(set(words[i : i + window])) / window for i in range(len(words) - window + 1)]
    value = mattr([[" ".join(words)]], window)[0]
    assert value == pytest.approx(np.mean(expected)) if expected else np.isnan(value)


def test_hdd_by_hand():
    # "a a a b" in pairs: 3 of 6 are aa (1 type), 3 are ab (2): mean 1.5 types, over 2.
    assert hdd([["a a a b"]], sample=2) == pytest.approx([0.75])
    assert hdd([["a a a b"]], sample=4) == pytest.approx([0.5])  # all four are drawn
    assert hdd([[" ".join(f"w{i}" for i in range(42))]]) == pytest.approx([1])
    assert hdd([["a " * 100]]) == pytest.approx([1 / 42])
    assert np.isnan(hdd([["a " * 41], []])).all()
    with pytest.raises(SpecError, match="sample"):
        hdd([["a"]], sample=0)


@given(WORDS, st.integers(1, 5))
def test_hdd_is_the_expected_ratio_of_a_draw(words, sample):
    draws = [len(set(draw)) / sample for draw in combinations(words, sample)]
    value = hdd([[" ".join(words)]], sample)[0]
    assert value == pytest.approx(np.mean(draws)) if draws else np.isnan(value)


def test_hdd_of_a_long_text_does_not_overflow():
    value = hdd([["a b c d " * 50_000]])[0]
    assert value == pytest.approx(4 * (1 - 0.75**42) / 42, rel=1e-3)  # 200,000 words: nearly with replacement


def test_yules_k_by_hand():
    # "a a b" counts 2, 1: 10^4 (4 + 1 - 3) / 9; four times a: 10^4 (16 - 4) / 16.
    values = yules_k([["a a", "B"], ["a a a a"], ["a b c"], ["x"], [], ["?!"]])
    np.testing.assert_allclose(values, [2e4 / 9, 7500, 0, 0, np.nan, np.nan])


def test_yules_k_hardly_depends_on_length_where_the_plain_ratio_does():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.zipf(1.6, 6000) if i < 500]
    short, long = " ".join(words[:1000]), " ".join(words)
    k = yules_k([[short], [long]])
    assert k[1] == pytest.approx(k[0], rel=0.15)
    plain = distinct_n([[short], [long]], 1)
    assert plain[1] < 0.5 * plain[0]


def test_distinct_n_by_hand():
    turns = [["a b a b"], ["a b", "a b"], ["a"], []]
    np.testing.assert_allclose(distinct_n(turns, 1), [2 / 4, 2 / 4, 1, np.nan])
    np.testing.assert_allclose(distinct_n(turns, 2), [2 / 3, 1 / 2, np.nan, np.nan])  # no gram b a across two utterances
    np.testing.assert_allclose(distinct_n(turns), distinct_n(turns, 2))
    with pytest.raises(SpecError, match="n-grams"):
        distinct_n([], 0)


def test_a_person_who_repeats_themselves_is_poorer_by_every_measure():
    poor = ["please tell me more about that " * 15]
    rich = [" ".join(f"{a}{b}" for a in "bcdfghjklm" for b in "aeiouyrst")]
    assert mattr([poor])[0] < mattr([rich])[0]
    assert hdd([poor])[0] < hdd([rich])[0]
    assert yules_k([poor])[0] > yules_k([rich])[0]
    assert distinct_n([poor])[0] < distinct_n([rich])[0]
