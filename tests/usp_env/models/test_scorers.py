"""Shipped scorers: arithmetic by hand on small weights, and the real ones where MiniLM is fetched."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import usp_env.models
from usp_env.errors import MissingAssetError, SpecError, UnknownNameError
from usp_env.models import features, pairs, scorers
from usp_env.models.pairs import FEATURES, TextState, pair_features

FOLDER = Path(usp_env.models.__file__).parent
COLUMN = {name: k for k, name in enumerate(FEATURES)}


def state(text: str, ids: list[int], tokens: list[list[float]], vector: list[float]) -> TextState:
    low = np.array(tokens, np.float32)
    return TextState(text, np.array(vector, np.float32), low, low, np.array(ids))


# ------------------------------------------------------------------ features


def test_hashes_are_the_same_on_every_machine() -> None:
    first = features.hashed_words(["use Go"], 2**10)
    assert first.indices.tolist() == PINNED_WORDS
    assert features.hashed_chars(["Go"], 2**10, (1, 2)).indices.tolist() == PINNED_CHARS


PINNED_WORDS = [141, 204, 299, 619, 755, 786, 889]
PINNED_CHARS = [226, 321, 417, 572, 621, 755, 758]


def test_rows_have_norm_one_and_count_logarithmically() -> None:
    # "a a b" and its ends ⟨ ⟩: a twice, b, ⟨, ⟩, ⟨a, aa, ab, b⟩ once: log 3 once and log 2 eight times before scaling
    row = features.hashed_words(["a a b"], 2**20)
    expected = np.array([np.log(3)] + [np.log(2)] * 7)
    assert sorted(row.values, reverse=True) == pytest.approx(expected / np.linalg.norm(expected))


def test_sparse_dot() -> None:
    sparse = features.Sparse(np.array([0, 2, 1]), np.array([1.0, 2.0, 3.0]), np.array([0, 2, 2, 3]))
    assert sparse.dot(np.array([10.0, 20.0, 30.0])).tolist() == [70.0, 0.0, 60.0]
    both = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert sparse.dot(both).tolist() == [[3.0, 2.0], [0.0, 0.0], [0.0, 3.0]]


def test_buckets_are_a_power_of_two() -> None:
    with pytest.raises(SpecError, match="power of two"):
        features.hashed_words(["a"], 1000)


def test_surface_of_a_short_turn() -> None:
    row = dict(zip(features.SURFACE, features.surface(["pls make it shorter"])[0], strict=False))
    assert row["first letter small"] == row["no capital"] == row["ends without"] == row["shortened word"] == 1
    assert row["ends . "] == row["commas"] == row["code fence"] == 0
    assert features.surface([]).shape == (0, features.surface_size())


def test_surface_knows_no_length() -> None:
    once, thrice = features.surface(["so what now, then", " ".join(["so what now, then"] * 3)])
    names = [name for name, a, b in zip(features.SURFACE, once, thrice, strict=False) if abs(a - b) > 0.01]
    assert set(names) <= {"distinct words", "sentence length"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Please write 3 tests", {"please", "please first", "small numbers"}),
        ("write it , please.", {"bids first", "please", "please last", "short words"}),
        ("can u do it ", {"asks first", "question unmarked", "can you", "chat words", "space at the end"}),
        ("What is it?", {"asks first"}),
        ("Don’t stop -- i'm IN", {"contracted", "curly quotes", "straight apostrophe", "small i", "me", "i want"}),
        (
            "It works.\n\nbut why,really??",
            {"small sentence", "blank line", "line with mark", "comma without space", "marks doubled"},
        ),
        ("A/B; x_y \u2014 z", {"/", ";", "_", "long dash"}),
        ("sooo nice\tthx\n", {"letter thrice", "interjections", "tab", "thanks", "chat words", "no vowel", "newline at the end"}),
    ],
)
def test_habits_that_a_text_shows(text: str, shown: set[str]) -> None:
    found = {name for name, value in zip(features.HABITS, features.habits([text])[0], strict=False) if value}
    assert found >= shown
    assert not (found - shown) & LOUD


LOUD = {
    "please",
    "can you",
    "chat words",
    "question unmarked",
    "space at the end",
    "blank line",
    "curly quotes",
    "small i",
    "tab",
}


def test_habits_are_counted_by_word_and_shape_follows() -> None:
    # twelve words on two lines, "please" twice: 10·2/12 is capped at 1, ";" once: 10/12
    row = features.habits(["please aa bb cc dd ee.\nplease aa bb; cc dd ee"])[0]
    names, n = list(features.HABITS), len(features.HABITS)
    assert len(row) == 2 * n + 5
    assert row[names.index("please")] == row[n + names.index("please")] == row[names.index(";")] == 1
    assert row[n + names.index(";")] == pytest.approx(10 / 12)
    # two lines, two sentences of six words each, six words a line; letters: ten twos and two sixes, mean 8/3, variance 20/9
    assert row[2 * n :] == pytest.approx([np.log(3), np.log(3), np.log(7), np.sqrt(20 / 9) / 3, 0])
    assert features.habits([]).shape == (0, 2 * n + 5)
    assert np.isfinite(features.habits(["", "?", "\n", "x" * 9000])).all()


# ------------------------------------------------------------------ pairs


def test_pair_features_by_hand() -> None:
    claim = state("use Go 3", [5, 6], [[1, 0], [0, 1]], [1, 0])
    evidence = [state("Go", [5], [[0.6, 0.8]], [0.6, 0.8]), state("three", [7], [[0, 1]], [0, 1])]
    idf = np.zeros(10)
    idf[[5, 6, 7]] = 1, 3, 2
    row = pair_features(claim, evidence, idf)
    value = {name: float(row[k]) for name, k in COLUMN.items()}
    assert value["cos max"] == pytest.approx(0.6)
    assert value["cos second"] == 0
    assert value["cos mean"] == pytest.approx(0.3)
    assert value["cos of mean"] == pytest.approx(0.6 / np.hypot(0.6, 1.8))
    assert value["align"] == pytest.approx((0.6 + 1) / 2)  # piece 5 finds .6, piece 6 finds 1
    assert value["align idf"] == pytest.approx((1 * 0.6 + 3 * 1) / 4)
    assert value["covered"] == pytest.approx(1 / 4)
    assert value["uncovered worst"] == 3
    assert value["back covered"] == pytest.approx(1)  # all of "Go" is in the claim
    assert (value["names"], value["names missing"]) == (1, 0)
    assert (value["numbers"], value["numbers missing"]) == (1, 0)  # "three" is 3


def test_missing_names_and_numbers() -> None:
    one = np.ones((1, 2), np.float32)
    make = lambda text: TextState(text, one[0], one, one, np.array([1]))  # noqa: E731
    row = pair_features(make("You use Django 4 and Qt."), [make("i use django 5")], np.ones(3))
    assert row[COLUMN["names"]] == 2
    assert row[COLUMN["names missing"]] == 1
    assert row[COLUMN["numbers"]] == 1
    assert row[COLUMN["numbers missing"]] == 1


def test_no_evidence_is_all_zero() -> None:
    claim = state("a", [5], [[1, 0]], [1, 0])
    assert not pair_features(claim, [], np.ones(9)).any()
    assert not pair_features(claim, [state("", [], np.zeros((0, 2)).tolist(), [0, 0])], np.ones(9)).any()


def test_order_of_the_matches() -> None:
    claim = state("a b", [1, 2], [[1, 0], [0, 1]], [1, 0])
    units = [state("a", [1], [[1, 0]], [1, 0]), state("b", [2], [[0, 1]], [0, 1])]
    assert pair_features(claim, units, np.ones(5))[COLUMN["order"]] == pytest.approx(1)
    assert pair_features(claim, units[::-1], np.ones(5))[COLUMN["order"]] == pytest.approx(-1)


# ------------------------------------------------------------------ heads


def test_a_head_of_two_layers() -> None:
    # (3 − 1)/2 = 1; hidden relu(1·[2, −1] + [0, 0]) = [2, 0]; 2·1 + 0·5 + .5 = 2.5
    layers = ((np.array([[2.0, -1.0]]), np.zeros(2)), (np.array([[1.0], [5.0]]), np.array([0.5])))
    assert scorers.Head(np.array([1.0]), np.array([2.0]), layers)(np.array([[3.0]])).tolist() == [2.5]


def test_what_is_far_outside_the_training_data_counts_as_its_edge() -> None:
    head = scorers.Head(np.zeros(1), np.ones(1), ((np.ones((1, 1)), np.zeros(1)),))
    assert head(np.array([[100.0], [-100.0]])).tolist() == [6, -6]


def test_sigmoid_is_rounded_and_never_overflows() -> None:
    assert scorers.sigmoid(np.array([0.0, 1e4, -1e4, 1.0])).tolist() == [0.5, 1.0, 0.0, 0.7311]


def test_human_likeness_by_hand() -> None:
    size = features.surface_size()
    tensors = {
        "words": np.zeros(2**10),
        "chars": np.zeros(2**10),
        "dense.mean": np.zeros(size),
        "dense.scale": np.ones(size),
        "dense.w0": np.eye(size)[:, [features.SURFACE.index("first letter small")]],
        "dense.b0": np.zeros(1),
    }
    model = scorers.HumanLikeness("toy", tensors, {"platt": [2.0, -1.0]})
    assert model(["so what", "So what"]).tolist() == [0.7311, 0.2689]  # σ(2·1 − 1), σ(2·0 − 1)
    assert model([]).shape == (0,)
    with pytest.raises(SpecError, match="got one str"):
        model("so what")


def test_style_vectors_have_norm_one() -> None:
    size = scorers.style_dense(["a"]).shape[1]
    tensors = {"projection": np.random.default_rng(0).normal(size=(size, 4)), "mean": np.zeros(size), "scale": np.ones(size)}
    model = scorers.StyleEncoder("toy", tensors, {"threshold": 0.5})
    vectors = model(["pls help", "Certainly! Here is a list."])
    assert vectors.shape == (2, model.dim)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert model([]).shape == (0, 4)


def test_style_vectors_by_hand() -> None:
    # columns: "first letter small" and "please" (present), less .5, over .5 and over .05: "pls" (1, -10 -> -5), "Please" (-1, 5)
    dense = scorers.style_dense(["pls", "Please"])
    columns = [features.SURFACE.index("first letter small"), features.surface_size() + 2 + list(features.HABITS).index("please")]
    assert dense[:, columns].tolist() == [[1, 0], [0, 1]]
    scale = np.full(dense.shape[1], 0.5)
    scale[columns[1]] = 0.05
    tensors = {"projection": np.eye(dense.shape[1])[:, columns], "mean": np.full(dense.shape[1], 0.5), "scale": scale}
    vectors = scorers.StyleEncoder("toy", tensors, {"threshold": 0.0})(["pls", "Please"])
    assert vectors == pytest.approx(np.array([[1, -5], [-1, 5]]) / np.sqrt(26))


def test_unknown_names_are_told() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'human-v1'"):
        scorers.load("human-v2")


def test_missing_weights_are_told() -> None:
    with pytest.raises(MissingAssetError, match="shipped weights"):
        scorers.read_weights("nothing-v1")


# ------------------------------------------------------------------ what ships


def test_shipped_weights_are_safetensors_within_the_budget() -> None:
    files = [FOLDER / f"{name}.safetensors" for name in scorers.NAMES]
    assert all(file.is_file() for file in files)
    assert sum(file.stat().st_size for file in files) <= 10_000_000
    assert not [file for file in FOLDER.rglob("*") if file.suffix in (".pkl", ".pt", ".bin", ".joblib")]


def test_shipped_human_likeness_tells_users_from_assistants_at_one_length() -> None:
    pytest.importorskip("safetensors")
    people = ["ok but can u make it shorter pls", "how do i sort a list of maps in go", "no thats wrong, try again"]
    models = ["Sure! Here is a shorter version:", "You can sort it with the sort package.", "I apologize for the confusion."]
    for name in ("human-v1", "human-v1-twin"):
        p = scorers.load(name)([*people, *models])
        assert p.shape == (6,)
        assert ((p >= 0) & (p <= 1)).all()
        assert p[:3].min() > p[3:].max()


def test_scores_do_not_depend_on_company() -> None:
    pytest.importorskip("safetensors")
    texts = ["ok but can u make it shorter pls", "Certainly.", "x" * 5000, ""]
    model = scorers.load("human-v1")
    assert model(texts).tolist() == [model([text])[0] for text in texts]


def test_shipped_style_encoder_knows_a_hand() -> None:
    pytest.importorskip("safetensors")
    model = scorers.load("style-v1")
    a, b, c = model(
        ["pls can u fix this code its broken", "ok thx but now u broke the other one", "Could you please elaborate on this?"]
    )
    assert a @ b > a @ c
    assert -1 < model.threshold < 1


@pytest.mark.assets
def test_shipped_verifiers() -> None:
    pytest.importorskip("torch")
    turns = ["how do i sort a list of maps in go", "and 3 of them by date?", "thanks"]
    facts = ["You want to sort a list of maps in Go.", "You want to sort a list of maps in Rust.", "You plan a wedding in Spain."]
    p = scorers.load("facts-v1").supported([turns] * 3, facts)
    assert p[0] > p[1] > p[2]
    assert scorers.load("facts-v1").supported([[]], facts[:1]).tolist() == [0.0]
    q = scorers.load("facts-v1").explains(
        ["You program in Go.\n\nYou write short questions.", "You plan a wedding."], turns[:1] * 2
    )
    assert q[0] > q[1]


@pytest.mark.assets
def test_shipped_answer_scorer_in_the_reward() -> None:
    pytest.importorskip("torch")
    from usp_env.rewards.goal import load_scorer

    scorer = load_scorer("answer-v1")
    request = "Ask how to sort a slice of structs in Go"
    right = "Call sort.Slice with a less function that compares the field you want to sort the structs by."
    rivals = [request, "sort slice structs Go sort slice structs Go", "The French Revolution began in 1789 in Paris."]
    p = scorer([right, *rivals], [request] * 4)
    assert p[0] > max(p[1:])
    assert scorer.raised(["how do i sort a slice of structs in go", "tell me about Paris"], [request] * 2).tolist() == [
        True,
        False,
    ]
    assert scorer([right], [request])[0] == p[0]  # from memory, whatever its company


@pytest.mark.assets
def test_everything_loads_within_ten_seconds() -> None:
    pytest.importorskip("torch")
    scorers.load.cache_clear()
    start = time.process_time()
    for name in scorers.NAMES:
        scorers.load(name)
    assert time.process_time() - start < 10


@pytest.mark.assets
def test_states_do_not_depend_on_company() -> None:
    pytest.importorskip("torch")
    short, long = "sort it", "please sort the following list of maps by their date, the newest one first"
    read = pairs.reader()
    alone = read([short])[0]
    read._cache.clear()
    beside = read([short, long])[0]
    assert np.allclose(alone.vector, beside.vector, atol=1e-5)
    assert alone.ids.tolist() == beside.ids.tolist()


def test_the_gate_of_the_answer_scorer() -> None:
    x = np.zeros((3, len(pairs.FEATURES)))
    x[:, pairs.FEATURES.index("cos max")] = [0.3, 0.3 + np.log(3) / 12, -1]
    np.testing.assert_allclose(scorers.about(x, (12.0, 0.3)), [0.5, 0.75, 1 / (1 + np.exp(15.6))])
    assert scorers.about(x, None).tolist() == [1, 1, 1]


@pytest.mark.assets
def test_a_lone_surrogate_is_refused_by_name() -> None:
    pytest.importorskip("torch")
    for name in ("answer-v1", "answer-v1-twin"):
        with pytest.raises(SpecError, match="lone surrogate at character 3"):
            scorers.load(name)(["abc\ud800"], ["a request"])
    with pytest.raises(SpecError, match="lone surrogate"):
        scorers.load("facts-v1").explains(["You cook."], ["\udfff"])
