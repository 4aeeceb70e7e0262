from __future__ import annotations

import types

import numpy as np
import pytest

from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.metrics import authenticity
from usp_env.metrics.authenticity import (
    adv,
    at_mark,
    ava,
    ava_sensitivity,
    human_likeness,
    joined,
    means_by_dialogue,
    percentile_curve,
    sem_sim,
    style_sim,
)

AXES = {
    "soup": (1.0, 0.0),
    "stew": (0.6, 0.8),
    "bike": (0.0, 1.0),
    "anti": (-1.0, 0.0),
    "Süppe 🍲": (3.0, 4.0),
    "void": (0.0, 0.0),
}


def axes(texts):
    axes.calls.append(list(texts))
    return np.array([AXES[text] for text in texts])


@pytest.fixture(autouse=True)
def _calls():
    axes.calls = []


def talk(*said: str, first: str = "user") -> Dialogue:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return Dialogue.of({"role": roles[i % 2], "content": text} for i, text in enumerate(said))


# Texts of dialogues


def test_joined_takes_the_user_turns_alone_and_the_paper_all():
    dialogues = [talk("a", "B", "c"), talk("X", "y", first="assistant"), Dialogue()]
    assert joined(dialogues) == ["a c", "y", ""]
    assert joined(dialogues, "paper") == ["a B c", "X y", ""]
    with pytest.raises(SpecError, match="protocol 'ours' or 'paper'"):
        joined(dialogues, "theirs")


# Sem-Sim and Style-Sim


def test_sem_sim_by_hand():
    values = sem_sim(["soup", "stew", "bike", "anti", "Süppe 🍲"], ["soup"] * 5, axes)
    assert values == pytest.approx([1, 0.6, 0, -1, 0.6])  # (3, 4) has norm 5: a cosine needs no unit vectors


def test_sem_sim_of_identity_is_exactly_one_and_each_text_is_embedded_once():
    drift = iter(range(100))

    def noisy(texts):  # what shares a batch moves a vector a little
        return np.array([[1.0, 1e-3 * next(drift)] for _ in texts])

    assert sem_sim(["a", "b", "a"], ["a", "b", "a"], noisy).tolist() == [1.0, 1.0, 1.0]
    sem_sim(["soup", "stew"], ["stew", "stew"], axes)
    assert axes.calls == [["soup", "stew"]]


def test_sem_sim_is_symmetric_and_a_swapped_target_scores_less():
    assert sem_sim(["stew"], ["bike"], axes) == sem_sim(["bike"], ["stew"], axes)
    real = ["soup", "bike"]
    assert sem_sim(["stew", "bike"], real, axes).mean() > sem_sim(["bike", "stew"], real, axes).mean()


def test_sem_sim_of_silence_is_no_number():
    values = sem_sim(["soup", "", " \n", "void", "soup"], ["", "soup", "", "soup", "soup"], axes)
    assert np.isnan(values[:4]).all()
    assert values[4] == 1
    assert sem_sim([], [], axes).shape == (0,)
    assert np.isnan(sem_sim([""], ["soup"], axes)).all()
    assert len(axes.calls) == 1  # nothing to embed, no call


def test_sem_sim_utterances_and_joined_dialogues_differ():
    by_word = {"a": (1, 0), "b": (0, 1), "a b": (1, 1), "b a": (1, 1)}

    def embed(texts):
        return np.array([by_word[text] for text in texts], float)

    real, swapped = talk("a", "-", "b"), talk("b", "-", "a")
    assert sem_sim(swapped.utterances("user"), real.utterances("user"), embed).tolist() == [0, 0]
    assert sem_sim(joined([swapped]), joined([real]), embed) == pytest.approx([1])


def test_bad_pairs_and_embedders_are_refused():
    with pytest.raises(SpecError, match="as many generated and real texts, got 1 and 2"):
        sem_sim(["soup"], ["soup", "stew"], axes)
    with pytest.raises(SpecError, match=r"\(2, d\), got \(1, 2\)"):
        sem_sim(["soup"], ["stew"], lambda texts: np.ones((1, 2)))
    with pytest.raises(SpecError, match="finite"):
        sem_sim(["soup"], ["stew"], lambda texts: np.full((2, 2), np.nan))


def test_style_sim_asks_the_style_encoder():
    def shouts(texts):
        return np.array([[1.0, 0.0] if text.isupper() else [0.0, 1.0] for text in texts])

    assert style_sim(["HI", "hi"], ["YO", "YO"], shouts).tolist() == [1, 0]


# AVA


def test_ava_by_hand():
    similarity = np.array([0.59, 0.6, 0.61, np.nan])
    np.testing.assert_array_equal(ava(similarity, 0.6), [0, 1, 1, np.nan])
    assert np.nanmean(ava(similarity, 0.6)) == pytest.approx(2 / 3)
    assert ava(np.zeros(0), 0.6).shape == (0,)


def test_ava_sensitivity_agrees_with_ava_and_falls():
    similarity = np.random.default_rng(0).uniform(-1, 1, 50)
    thresholds = [-1, -0.5, 0, 0.5, 1.1]
    shares = ava_sensitivity(similarity, thresholds)
    assert shares == pytest.approx([ava(similarity, threshold).mean() for threshold in thresholds])
    assert shares[0] == 1
    assert shares[-1] == 0
    assert (np.diff(shares) < 0).all()
    assert np.isnan(ava_sensitivity(np.array([np.nan]), [0.1, 0.2])).tolist() == [True, True]


# Human-likeness


def test_human_likeness_is_a_mean_per_dialogue_from_one_call():
    calls = []

    def scorer(texts):
        calls.append(list(texts))
        return np.array([0.1 * len(text) for text in texts])

    values = human_likeness([["a", "bbb"], [], ["cc"]], scorer)
    np.testing.assert_allclose(values, [0.2, np.nan, 0.2])
    assert calls == [["a", "bbb", "cc"]]
    assert np.isnan(human_likeness([[], []], scorer)).all()
    assert human_likeness([], scorer).shape == (0,)


def test_human_likeness_is_a_probability():
    with pytest.raises(SpecError, match=r"\[0, 1\]"):
        human_likeness([["a"]], lambda texts: np.array([1.5]))


def test_means_by_dialogue_by_hand():
    values = means_by_dialogue(np.array([1.0, 3.0, np.nan, 5.0, np.nan]), [2, 2, 0, 1])
    np.testing.assert_array_equal(values, [2, 5, np.nan, np.nan])
    assert means_by_dialogue(np.zeros(0), []).shape == (0,)
    with pytest.raises(SpecError, match="values and utterances, got 1 and 2"):
        means_by_dialogue(np.zeros(1), [2])


# ADV


def vectors(texts):
    """A text's own vector, the same in every process."""
    return np.array([np.random.default_rng(sum(map(ord, text))).normal(size=5) * [9, 4, 1, 1, 1] for text in texts])


REAL = [talk(f"real {i}", f"Sure {i}.") for i in range(12)]
NEAR = [talk(f"near {i}", f"Sure {i}.") for i in range(12)]


def reduced(points, fitted_on):
    """The same plane by numpy: standardise by the fitted rows, rotate to their two largest directions."""
    mean, scale = fitted_on.mean(axis=0), fitted_on.std(axis=0)
    _, _, directions = np.linalg.svd((fitted_on - mean) / scale)
    return (points - mean) / scale @ directions[:2].T


def test_adv_of_identical_sets_is_zero():
    pytest.importorskip("sklearn")
    for protocol in ("ours", "paper"):
        assert adv(REAL, {"same": REAL}, vectors, protocol=protocol)["same"].tolist() == [0] * 12


def test_adv_ours_is_fitted_on_real_user_turns():
    pytest.importorskip("sklearn")
    real, near = (vectors([d.utterances("user")[0] for d in own]) for own in (REAL, NEAR))
    expected = np.linalg.norm(reduced(near, real) - reduced(real, real), axis=1)
    alone = adv(REAL, {"near": NEAR}, vectors)["near"]
    assert alone == pytest.approx(expected)
    beside = adv(REAL, {"near": NEAR, "far": [talk(f"far {i}!") for i in range(12)]}, vectors)
    assert beside["near"] == pytest.approx(alone)  # whom it is shown beside does not matter
    assert list(beside) == ["near", "far"]


def test_adv_paper_is_fitted_jointly_on_all_turns():
    pytest.importorskip("sklearn")
    far = [talk(f"far {i}!", "No.") for i in range(12)]
    sets = [vectors([" ".join(m.content for m in d) for d in own]) for own in (REAL, NEAR, far)]
    plane = [reduced(own, np.concatenate(sets)) for own in sets]
    values = adv(REAL, {"near": NEAR, "far": far}, vectors, protocol="paper")
    assert values["near"] == pytest.approx(np.linalg.norm(plane[1] - plane[0], axis=1))
    assert values["far"] == pytest.approx(np.linalg.norm(plane[2] - plane[0], axis=1))
    assert not np.allclose(adv(REAL, {"near": NEAR}, vectors, protocol="paper")["near"], values["near"])


def test_adv_reference_is_what_the_plane_is_fitted_on():
    pytest.importorskip("sklearn")
    real, near = (vectors([d.utterances("user")[0] for d in own]) for own in (REAL, NEAR))
    expected = np.linalg.norm(reduced(near[:2], real) - reduced(real[:2], real), axis=1)
    assert adv(REAL[:2], {"near": NEAR[:2]}, vectors, reference=REAL)["near"] == pytest.approx(expected)
    with pytest.raises(SpecError, match="no reference"):
        adv(REAL, {}, vectors, protocol="paper", reference=REAL)


def test_adv_of_silence_is_no_number():
    pytest.importorskip("sklearn")
    real, near = [*REAL[:5], Dialogue()], [Dialogue(), talk(" "), *NEAR[2:6]]
    values = adv(real, {"near": near}, vectors)["near"]
    assert np.isnan(values).tolist() == [True, True, False, False, False, True]
    kept = adv(REAL[:5], {"near": NEAR[:5]}, vectors)["near"]
    assert values[2:5] == pytest.approx(kept[2:5])  # silence does not move the plane


@pytest.mark.parametrize(
    ("real", "message"),
    [(REAL[:2], "at least 3"), ([], "at least 3"), ([talk("a")] * 5, "span a plane"), ([Dialogue()] * 5, "at least 3")],
)
def test_adv_needs_a_plane(real, message):
    pytest.importorskip("sklearn")
    with pytest.raises(SpecError, match=message):
        adv(real, {"near": real}, vectors)


def test_adv_needs_pairs():
    with pytest.raises(SpecError, match="dialogues of 'near' and real ones, got 3 and 12"):
        adv(REAL, {"near": NEAR[:3]}, vectors)


def test_percentile_curve_by_hand():
    distances = np.array([4.0, 0.0, 2.0, np.nan])
    curve = percentile_curve(distances)
    assert curve.shape == (21,)
    # Ranks 0, 50, 100 hold 0, 2, 4: the curve is the straight line 4 p / 100.
    assert curve == pytest.approx(np.linspace(0, 4, 21))
    assert at_mark(distances) == pytest.approx(2.4)
    assert at_mark(distances, 25) == pytest.approx(1)
    assert np.isnan(percentile_curve(np.array([np.nan]))).all()
    assert np.isnan(at_mark(np.zeros(0)))
    assert authenticity.PERCENTILES == (0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 100)


def test_missing_scikit_learn_is_told(monkeypatch):
    from usp_env.errors import MissingExtraError

    def none(module: str, extra: str) -> types.ModuleType:
        raise MissingExtraError(f"{module} {extra}")

    monkeypatch.setattr(authenticity, "require", none)
    with pytest.raises(MissingExtraError, match="sampling"):
        adv(REAL, {"near": NEAR}, vectors)
