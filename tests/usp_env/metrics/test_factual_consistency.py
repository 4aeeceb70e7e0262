"""Fact.Con and the six measures made of it. (Its name is not `test_consistency.py`: the reward's test has that one.)"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.metrics import consistency as c
from usp_env.metrics.consistency import DialogueTurns, FactualConsistency, ProfileText
from usp_env.profiles import Profile

# Tables 2, 4 and 6 of the paper (arXiv 2502.18968): precision, recall, published harmonic mean. All 14 rows that have one.
PUBLISHED = {
    "LMSYS-USP GPT4o": (86.89, 82.24, 84.50),
    "LMSYS-USP distill-llama3": (86.15, 81.95, 84.00),
    "Persona-Chat GPT4o": (86.21, 62.76, 72.64),
    "Persona-Chat human": (76.21, 42.94, 54.93),
    "ConvAI2 GPT4o": (68.71, 39.15, 49.88),
    "ConvAI2 human": (25.69, 12.64, 16.94),
    "Character_LLM": (25.48, 6.43, 10.27),
    "Character_GLM": (39.51, 29.61, 33.85),
    "ProfileGPT(llama)": (67.09, 29.98, 41.44),
    "ProfileGPT(4o)": (76.59, 43.72, 55.66),
    "USP w/o RLCC": (53.17, 71.88, 61.13),
    "USP(8:2)": (56.24, 74.38, 64.05),
    "USP(5:5)": (52.23, 71.59, 60.39),
    "USP(9:1)": (58.36, 70.62, 63.90),
}


class Words:
    """Supports a fact, or explains a turn, by the share of its words (you and I aside) that the evidence has; counts its calls."""

    def __init__(self) -> None:
        self.supports: list[list[tuple[tuple[str, ...], str]]] = []
        self.explanations: list[list[tuple[str, str]]] = []

    def supported(self, turns: Sequence[Sequence[str]], facts: Sequence[str]) -> np.ndarray:
        self.supports.append([(tuple(t), f) for t, f in zip(turns, facts, strict=True)])
        return np.array([self._share(" ".join(t), f) for t, f in zip(turns, facts, strict=True)])

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> np.ndarray:
        self.explanations.append(list(zip(profiles, turns, strict=True)))
        return np.array([self._share(p, t) for p, t in zip(profiles, turns, strict=True)])

    @staticmethod
    def _share(evidence: str, claim: str) -> float:
        words = [word.strip(".,?!").lower() for word in claim.split()]
        known = {word.strip(".,?!").lower() for word in evidence.split()}
        counted = [word for word in words if word not in ("you", "i")]
        return sum(word in known for word in counted) / len(counted)


COOK = ProfileText("You cook leeks. You sew. You swim.")  # facts: cook leeks / sew / swim
TALK = DialogueTurns(("i cook", "leeks pls", "sew sew rain rain"))


def test_the_harmonic_mean_of_all_published_rows() -> None:
    assert len(PUBLISHED) == 14
    for name, (p, r, published) in PUBLISHED.items():
        assert c.harmonic_mean(p, r) == pytest.approx(published, abs=0.015), name


def test_the_harmonic_mean_at_its_edges() -> None:
    got = c.harmonic_mean([0.0, 1.0, 0.5, np.nan, 1.0], [0.0, 0.0, 0.5, 1.0, np.nan])
    np.testing.assert_array_equal(got, [0.0, 0.0, 0.5, np.nan, np.nan])
    assert c.harmonic_mean(0.25, 0.75) == pytest.approx(0.375)  # 2 · .1875 / 1


def test_precision_and_recall_by_hand() -> None:
    verifier = Words()
    # DP.P, dialogue supports profile facts: cook leeks 2/2, sew 1/1, swim 0/1 -> 2/3.
    assert c.dp_p([TALK], [COOK], verifier).tolist() == pytest.approx([2 / 3])
    # DP.R, profile explains turns: cook 1/1, leeks pls 1/2, and with the third, sew sew rain rain 2/4, (1 + .5 + .5) / 3.
    assert c.dp_r([COOK], [TALK], verifier).tolist() == pytest.approx([2 / 3])
    talk = DialogueTurns(("i cook", "leeks pls"))
    assert c.dp_r([COOK], [talk], verifier).tolist() == pytest.approx([0.75])
    assert c.dp_p([talk], [COOK], verifier).tolist() == pytest.approx([1 / 3])  # cook leeks 1, sew 0, swim 0


def test_the_direction_decides_which_head_is_asked() -> None:
    talk, verifier = DialogueTurns(("i cook",)), Words()
    c.dp_p([talk], [COOK], verifier)
    assert (len(verifier.supports), len(verifier.explanations)) == (1, 0)
    assert [fact for _, fact in verifier.supports[0]] == ["You cook leeks.", "You sew.", "You swim."]
    c.r_dp_p([COOK], [talk], verifier)
    assert (len(verifier.supports), len(verifier.explanations)) == (1, 1)
    assert verifier.explanations[0] == [(COOK.prose, "i cook")]


def test_swapping_source_and_target_swaps_precision_and_recall() -> None:
    talk, verifier = DialogueTurns(("i cook", "leeks pls")), Words()
    there, back = FactualConsistency([talk], [COOK])(verifier), FactualConsistency([COOK], [talk])(verifier)
    assert there.tolist() == pytest.approx([1 / 3])
    assert back.tolist() == pytest.approx([0.75])
    assert (c.dp_p([talk], [COOK], verifier), c.dp_r([COOK], [talk], verifier)) == (there, back)
    assert (c.r_dp_p([COOK], [talk], verifier), c.r_dp_r([talk], [COOK], verifier)) == (back, there)  # the swapped pair
    assert c.harmonic_mean(there, back).tolist() == pytest.approx([2 * 0.25 / (1 / 3 + 0.75)])


@pytest.mark.parametrize(
    ("function", "first", "second"),
    [(c.dp_p, [COOK], [TALK]), (c.dp_r, [TALK], [COOK]), (c.r_dp_p, [TALK], [COOK]), (c.r_dp_r, [COOK], [TALK])],
)
def test_swapped_arguments_are_refused(function, first, second) -> None:
    with pytest.raises(SpecError, match="swapped"):
        function(first, second, Words())
    assert function(second, first, Words()).shape == (1,)


def test_a_pair_must_be_a_profile_and_a_dialogue() -> None:
    for source, target in (([COOK], [COOK]), ([TALK], [TALK]), ([COOK], []), ([COOK, TALK], [TALK, COOK]), (["a"], [COOK])):
        with pytest.raises(SpecError):
            FactualConsistency(source, target)


def test_many_people_are_one_call_and_score_as_alone() -> None:
    talks = [DialogueTurns(("i cook", "leeks pls")), DialogueTurns(("rain",)), DialogueTurns(("sew", "swim", "cook leeks"))]
    profiles = [COOK, ProfileText("You sew."), COOK]
    verifier = Words()
    p, r = c.r_dp_p(profiles, talks, verifier), c.r_dp_r(talks, profiles, verifier)
    assert (len(verifier.supports), len(verifier.explanations)) == (1, 1)
    for i in range(3):
        assert p[i] == c.r_dp_p([profiles[i]], [talks[i]], Words())[0]
        assert r[i] == c.r_dp_r([talks[i]], [profiles[i]], Words())[0]
    assert p.tolist() == [0.75, 0.0, 1.0]
    assert c.harmonic_mean(p, r)[1] == 0.0


def test_what_says_nothing_has_no_value_and_is_not_asked() -> None:
    verifier = Words()
    silent, blank = DialogueTurns(()), ProfileText(" \n\n ")
    profiles, talks = [COOK, blank, COOK], [silent, TALK, DialogueTurns((" ", "\n"))]
    assert np.isnan(c.r_dp_p(profiles, talks, verifier)).all()
    assert np.isnan(c.r_dp_r(talks, profiles, verifier)).all()
    assert not verifier.supports
    assert not verifier.explanations
    assert c.dp_p([], [], verifier).shape == (0,)


def test_a_blank_turn_is_left_out_and_keeps_its_place() -> None:
    rows = FactualConsistency([COOK], [DialogueTurns(("i cook", " ", "rain"))]).scores(Words())
    np.testing.assert_array_equal(rows[0], [1.0, np.nan, 0.0])
    assert c.r_dp_p([COOK], [DialogueTurns(("i cook", " ", "rain"))], Words()).tolist() == [0.5]


def test_unicode_and_both_paragraphs() -> None:
    profile = Profile("a", "You cook œufs.", "You write tersely.")
    assert ProfileText.of(profile).facts() == ["You cook œufs.", "You write tersely."]
    talk = DialogueTurns.of(
        Dialogue.of([{"role": "user", "content": "œufs\u2028cook"}, {"role": "assistant", "content": "tersely"}])
    )
    assert talk.turns == ("œufs\u2028cook",)  # not split at a line separator, and nothing of the assistant
    assert c.r_dp_r([talk], [ProfileText.of(profile)], Words()).tolist() == [0.5]


def test_a_verifier_out_of_range_or_shape_is_refused() -> None:
    class Bad:
        def __init__(self, values: object) -> None:
            self.values = values

        def explains(self, profiles: object, turns: object) -> np.ndarray:
            return np.array(self.values)

    for values in ([1.5], [-0.1], [np.nan], [0.5, 0.5], [[0.5]]):
        with pytest.raises(SpecError, match="verifier"):
            c.dp_r([COOK], [DialogueTurns(("cook",))], Bad(values))


@pytest.mark.assets
def test_the_packaged_verifier_tells_a_persons_own_profile() -> None:
    pytest.importorskip("torch")
    from usp_env.models import scorers

    profiles = [
        ProfileText("You run a small bakery in Lyon and want to sell bread online. You ask how to price sourdough."),
        ProfileText("You study Rust and write a parser for log files. You ask how to read a file line by line."),
    ]
    talks = [
        DialogueTurns(("how should i price sourdough in my bakery?", "can i sell bread online in france")),
        DialogueTurns(("how do i read a file line by line in rust", "my parser for log files is slow")),
    ]
    verifier = scorers.load("facts-v1")
    assert (c.r_dp_p(profiles, talks, verifier) > c.r_dp_p(profiles, talks[::-1], verifier) + 0.2).all()
    assert (c.r_dp_r(talks, profiles, verifier) > c.r_dp_r(talks[::-1], profiles, verifier) + 0.2).all()
