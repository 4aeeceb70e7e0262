"""P.Cover: its published constants, and scores by hand."""

from __future__ import annotations

import json
import math
from importlib import resources

import numpy as np
import pytest

from usp_env.errors import SpecError
from usp_env.metrics.consistency import DialogueTurns, ProfileText
from usp_env.metrics.coverage import GLOVE_HEAD, SPECIAL_RANK, STOP_WORDS, UNKNOWN_RANK, default_ranks, idf, persona_coverage


def test_the_published_idf_constants() -> None:
    """Of the table published with Song et al. 2019: its lines for these words, and for words GloVe's 400,000 do not hold."""
    assert GLOVE_HEAD == {"the": 1, ",": 2, ".": 3, "of": 4, "to": 5, "and": 6, "i": 42}
    published = {GLOVE_HEAD["."]: 0.073314, GLOVE_HEAD["i"]: 0.092453, SPECIAL_RANK: 0.057873, 400_000: 0.588290}
    for rank, weight in published.items():
        assert idf(rank) == pytest.approx(weight, abs=1.5e-6)


def test_idf_by_hand_and_in_order() -> None:
    assert idf(1) == pytest.approx(1 / (1 + math.log(1 + 1e6)))  # tf = 1e6
    assert idf(10) == pytest.approx(1 / (1 + math.log(1 + 1e6 / 10**1.07)))
    weights = idf(np.arange(1, 500_000, 997))
    assert (np.diff(weights) > 0).all()  # a rarer word weighs more
    assert weights.min() > 0
    assert weights.max() < 1


RANKS = {"leeks": 1, "soup": 10, "butter": 100}
A, B, C = (1 / (1 + math.log(1 + 1e6 / rank**1.07)) for rank in (1, 10, 100))


def one(turns: tuple[str, ...], prose: str, **options: object) -> float:
    return float(persona_coverage([DialogueTurns(turns)], [ProfileText(prose)], ranks=RANKS, **options)[0])


def test_scores_by_hand() -> None:
    prose = "You like leeks and soup. You sell butter."
    assert one(("leeks",), prose) == pytest.approx(A)
    assert one(("butter",), prose) == pytest.approx(C)
    assert one(("soup leeks soup!",), prose) == pytest.approx((A + B) / 2)  # mean over the shared words, each once
    assert one(("leeks butter",), prose) == pytest.approx(max(A, C))  # best sentence, not their union
    assert one(("leeks", "rain"), prose) == pytest.approx(A / 2)  # mean over the turns
    assert one(("rain",), prose) == 0.0


def test_stop_words_case_and_apostrophes() -> None:
    assert {"the", "you", "and", "please", "thanks"} <= STOP_WORDS
    assert one(("you and the",), "You and the leeks.") == 0.0
    assert one(("you and the",), "You and the leeks.", stop_words=()) > 0
    assert one(("LEEKS?",), "You like leeks.") == one(("leek's leeks’",), "You like leeks.") == pytest.approx(A)
    assert one(("you're he's i'm",), "You're he's I'm.") == 0.0
    assert one(("the soup's cold",), "You like soup.") == pytest.approx(B)


def test_unknown_words_rank_after_the_table() -> None:
    assert one(("œufs",), "You like œufs.") == pytest.approx(float(idf(101)))
    assert one(("œufs",), "You like œufs.", unknown_rank=400_000) == pytest.approx(0.588290, abs=1.5e-6)
    got = persona_coverage([DialogueTurns(("qzxv",))], [ProfileText("You like qzxv.")])
    assert got.tolist() == pytest.approx([float(idf(UNKNOWN_RANK))])


def test_what_says_nothing_has_no_value() -> None:
    talks = [DialogueTurns(()), DialogueTurns((" ",)), DialogueTurns(("leeks",)), DialogueTurns(("leeks", " "))]
    profiles = [ProfileText("You like leeks.")] * 2 + [ProfileText("")] + [ProfileText("You like leeks.")]
    np.testing.assert_allclose(persona_coverage(talks, profiles, ranks=RANKS), [np.nan, np.nan, np.nan, A])
    assert persona_coverage([], []).shape == (0,)


def test_bad_arguments() -> None:
    with pytest.raises(SpecError, match="one profile"):
        persona_coverage([DialogueTurns(("a",))], [])
    with pytest.raises(SpecError, match="above 0"):
        one(("a",), "You sew.", unknown_rank=0)
    with pytest.raises(SpecError, match="above 0"):
        persona_coverage([], [], ranks={"a": 0})


def test_the_shipped_table() -> None:
    file = resources.files("usp_env.data") / "word_ranks.json"
    assert len(file.read_bytes()) <= 200_000
    words = json.loads(file.read_text("utf-8"))["words"].split()
    assert len(words) == len(set(words)) == 21_719
    ranks = default_ranks()
    assert {word: ranks[word] for word in GLOVE_HEAD} == GLOVE_HEAD
    assert ranks["music"] < ranks["guitar"] < ranks["salamanca"]
    rare = persona_coverage([DialogueTurns(("salamanca",))], [ProfileText("You like Salamanca.")])
    common = persona_coverage([DialogueTurns(("city",))], [ProfileText("You like the city.")])
    assert rare > common
