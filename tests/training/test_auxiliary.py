"""Metrics by hand, near misses, matched lengths, and what the training programs may not touch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import auxiliary, human_likeness, verifiers
from training.auxiliary import auc, bootstrap, macro_f1, platt, usable, youden
from training.human_likeness import Example, weights_of
from training.near_misses import near_misses
from training.style_encoder import Turns, discriminant, partners, scatter, trials
from usp_env.dialogue import Dialogue


def test_auc_counts_ties_half() -> None:
    # positives .9, .5; negatives .5, .1: pairs .9>.5, .9>.1, .5=.5 (half), .5>.1 -> 3.5 of 4
    assert auc(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0])) == 0.875


def test_auc_of_one_class_is_not_a_number() -> None:
    assert np.isnan(auc(np.array([0.2, 0.3]), np.array([1, 1])))


def test_macro_f1() -> None:
    # class 1: 2 hits of 3 predicted and 2 true -> 2·2/(3+2) = .8; class 0: 1 hit of 1 predicted and 2 true -> 2/3
    assert macro_f1(np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0])) == pytest.approx((0.8 + 2 / 3) / 2)


def test_youden_lies_between_the_scores_it_separates() -> None:
    # t in (.4, .6]: TPR 2/3, FPR 0 -> .67; t in (.1, .2]: TPR 1, FPR 2/3 -> .33
    scores, labels = np.array([0.9, 0.6, 0.4, 0.3, 0.2, 0.1]), np.array([1, 1, 0, 0, 1, 0])
    assert youden(scores, labels) == pytest.approx(0.5)


def test_youden_never_cuts_through_equal_scores() -> None:
    assert youden(np.array([0.5, 0.5, 0.1]), np.array([1, 0, 0])) == pytest.approx(0.3)


def test_platt_recovers_a_known_logistic() -> None:
    x = np.linspace(-3, 3, 4001)
    p = 1 / (1 + np.exp(-(2 * x - 0.5)))
    # each point once as a positive with weight p and once as a negative with weight 1 − p: the likelihood's maximum is (2, −.5)
    a, b = platt(np.tile(x, 2), np.repeat([1, 0], len(x)), np.concatenate([p, 1 - p]))
    assert (a, b) == (pytest.approx(2, abs=0.01), pytest.approx(-0.5, abs=0.01))


def test_bootstrap_draws_whole_clusters() -> None:
    # Two clusters: a mean is 0 or 1 in every fourth draw. Of single rows a mean is .5 ± .05, and leaves [.3, .7] in no draw.
    values = np.repeat([0.0, 1.0], 50)
    estimate, low, high = bootstrap(["a"] * 50 + ["b"] * 50, lambda i: float(values[i].mean()), n=200)
    assert (estimate, low, high) == (0.5, 0.0, 1.0)


def test_saved_weights_are_small_and_keep_their_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors")
    monkeypatch.setattr(auxiliary, "MODELS", tmp_path)
    path = auxiliary.save("toy", {"big": np.ones((100, 100)), "small": np.ones(3)}, {"threshold": 0.25})
    with safetensors.safe_open(path, "numpy") as file:
        assert file.get_tensor("big").dtype == np.float16
        assert file.get_tensor("small").dtype == np.float32
        assert json.loads(file.metadata()["usp_env"]) == {"name": "toy", "threshold": 0.25}


def test_weights_give_each_kind_its_share() -> None:
    found = [Example("a", "x", kind) for kind in ("user", "user", "matched", "reply")]
    weight = weights_of(found)
    assert weight[:2].sum() / weight.sum() == pytest.approx(0.5 / 0.97)  # nothing role-played here
    assert weight[2] / weight[3] == pytest.approx(0.3 / 0.17)


def test_kept_role_play_is_of_the_same_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = []

    def roleplay(chosen: list[auxiliary.Person], n: int, seed: int) -> list[Example]:
        played.append([person.id for person in chosen[:n]])
        return [Example(person.id, "hi", "roleplay") for person in chosen[:n]]

    monkeypatch.setattr(human_likeness, "roleplay", roleplay)
    talk = _talk("hi", "so.")
    found = {"train": [auxiliary.Person(i, talk) for i in "abcd"], "test": [auxiliary.Person(i, talk) for i in "xyz"]}
    cache = tmp_path / "played.json"
    expected = {"train": [Example(i, "hi", "roleplay") for i in "ab"], "test": [Example("x", "hi", "roleplay")]}
    for _ in range(2):
        assert human_likeness._played(found, 2, cache) == expected
    assert played == [["a", "b"], ["x"]]
    assert len(human_likeness._played(found, 4, cache)["train"]) == 4
    assert played[2:] == [["a", "b", "c", "d"], ["x", "y"]]


def test_kept_features_are_of_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def matrix(read: object, idf: np.ndarray, claims: list[str], evidence: list[tuple[str, ...]]) -> np.ndarray:
        asked.append(claims)
        return np.full((len(claims), 1), float(idf.sum()))

    monkeypatch.setattr(verifiers, "pair_matrix", matrix)
    one, other = (verifiers.Pair("a", "You cook.", (turn,), "true") for turn in ("eggs?", "ham?"))
    for _ in range(2):
        assert verifiers.featured([one], None, np.ones(3), tmp_path, "fact").lexical.tolist() == [[3.0]]
    assert len(asked) == 1
    verifiers.featured([other], None, np.ones(3), tmp_path, "fact")
    assert verifiers.featured([one], None, np.ones(4), tmp_path, "fact").lexical.tolist() == [[4.0]]
    assert len(asked) == 3


def test_topic_control_picks_distant_positives_and_near_negatives() -> None:
    topic = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.99, 0], [0, 1]], float)
    turns = Turns(["a0", "a1", "a2", "b0", "b1"], np.array(list("aaabb")), topic)
    found = trials(turns, {"a"}, True, np.random.default_rng(0))
    assert found.pairs[:2].tolist() == [[0, 2], [0, 3]]
    assert found.same.tolist() == [True, False] * 3
    assert set(found.cluster) == {"a"}


def test_partners_under_control_and_at_random() -> None:
    topic = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.99, 0], [0, 1]], float)
    turns = Turns(["a0", "a1", "a2", "b0", "b1"], np.array(list("aaabb")), topic)
    far, mine, near, anyone = partners(turns, np.random.default_rng(0))
    assert far.tolist() == [2, 2, 0, 4, 3]
    assert near.tolist() == [3, 3, 4, 0, 2]
    assert (turns.author[mine] == turns.author).all()
    assert (mine != np.arange(5)).all()
    assert (turns.author[anyone] != turns.author).all()


def test_scatter() -> None:
    # differences (1, 2) and (-1, -2) of the first two rows, (0, 0) of the last: (2/3) [[1, 2], [2, 4]]
    x = np.array([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]])
    assert scatter(x, np.array([1, 0, 2])) == pytest.approx(np.array([[2, 4], [4, 8]]) / 3)


def test_discriminant_weighs_what_strangers_do_not_share() -> None:
    pytest.importorskip("scipy")
    # ratios 3/1, 6/4 and 1/2: directions of within-norm 1 scaled by √2 and √.5; the third, under 1, is left out
    found = discriminant(np.diag([1.0, 4.0, 2.0]), np.diag([3.0, 6.0, 1.0]), 0.0, 3)
    assert np.abs(found) == pytest.approx(np.array([[np.sqrt(2), 0], [0, np.sqrt(0.5) / 2], [0, 0]]))
    # shrinkage adds .5 · 2, half the mean, to 1, 3 and 2: ratios 6/2, 3.9/4 and 2.9/3; √(3 − 1) over √2
    assert np.abs(discriminant(np.diag([1.0, 3.0, 2.0]), np.diag([6.0, 3.9, 2.9]), 0.5, 3)) == pytest.approx(
        np.array([[1.0], [0], [0]])
    )
    assert discriminant(np.diag([1.0, 4.0]), np.diag([3.0, 6.0]), 0.0, 1).shape == (2, 1)


def test_near_misses_change_one_detail_that_the_person_did_not_say() -> None:
    names, vectors = ["Django", "Flask", "Laravel"], np.array([[1, 0], [0.9, 0.4], [0.8, 0.6]])
    fact, said = "You first ask for 3 views in Django from Canada.", "3 views, django or flask, canada"
    made = {m.kind: m.text for m in near_misses(fact, said, names, vectors, np.random.default_rng(0))}
    assert set(made) == {"number", "tool", "place", "order"}
    assert made["tool"] == "You first ask for 3 views in Laravel from Canada."  # Flask is nearer, but was said
    assert made["order"] == "You finally ask for 3 views in Django from Canada."
    assert "Canada" not in made["place"]
    assert " 3 " not in made["number"]
    (many,) = near_misses("You count 8,000,000,000 people.", "", [], vectors, np.random.default_rng(0))  # and not for an hour
    assert abs(int(re.search(r"\d+", many.text)[0]) - 8_000_000_000) <= 100


def _talk(*turns: str) -> Dialogue:
    return Dialogue.of({"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(turns))


@pytest.mark.parametrize(
    ("turns", "fit"),
    [
        (("how do i sort the list in go", "so.", "and what of the maps", "so.", "thanks, show me the code"), True),
        (("how do i sort the list in go", "so.", "and what of the maps"), False),  # two user turns
        (("write to me at a.b@example.org please", "so.", "and what of the maps", "so.", "show me the code"), False),
        (("wie sortiere ich eine Liste", "so.", "und was ist mit Karten", "so.", "zeig mir bitte Code"), False),
        (("x" * 2001, "so.", "and what of the maps", "so.", "show me the code"), False),
    ],
)
def test_which_conversations_are_usable(turns: tuple[str, ...], fit: bool) -> None:
    assert usable(_talk(*turns)) is fit


def test_reserved_conversations_reach_no_training_program(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = _talk("how do i sort the list in go", "so.", "and what of the maps", "so.", "thanks, show me the code")
    kept = sorted(auxiliary.reserved_ids())[0]

    def conversations(source: str) -> list[object]:
        return [type("C", (), {"id": key, "dialogue": talk})() for key in (kept, "own_0")]

    monkeypatch.setattr(auxiliary.conversations, "load", conversations)
    monkeypatch.setattr(auxiliary, "held_out_turns", lambda bank: frozenset())
    assert {person.id for split in auxiliary.people().values() for person in split} == {"own_0"}


def test_a_kill_while_a_cache_is_written_leaves_none(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def torn(stream: Any) -> None:
        stream.write(b"half")
        raise Killed

    with pytest.raises(Killed):
        auxiliary.keep(tmp_path / "deep" / "x.npy", torn)
    assert not (tmp_path / "deep" / "x.npy").exists()
    auxiliary.keep(tmp_path / "deep" / "x.npy", lambda stream: np.save(stream, np.arange(3)))
    assert np.load(tmp_path / "deep" / "x.npy").tolist() == [0, 1, 2]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["x.npy"]
