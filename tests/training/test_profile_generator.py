"""The profile generator's rows, and what its readings are compared with."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from training import agreement  # noqa: E402
from training.profile_generator import make_rows  # noqa: E402
from training.sft_rows import IGNORED  # noqa: E402
from usp_env.dialogue import Dialogue  # noqa: E402
from usp_env.extraction.generator import ProfileTexts, parse_profile, profile_messages  # noqa: E402
from usp_env.models import assets  # noqa: E402
from usp_env.profiles import Profile  # noqa: E402
from usp_env.rendering import Renderer  # noqa: E402

PROFILE = Profile("a", "You are a cook.", "You write tersely.")
TALK = Dialogue.of(
    [
        {"role": "user", "content": "how long do i boil eggs"},
        {"role": "assistant", "content": "Six minutes, says THE ASSISTANT."},
        {"role": "user", "content": "and quail eggs?"},
    ]
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(transformers.AutoTokenizer.from_pretrained(assets.path("smollm2-135m")))


@pytest.mark.assets
def test_a_row_is_the_prompt_of_inference_and_the_profile_alone_is_trained(renderer) -> None:
    (row,) = make_rows(renderer, [(PROFILE, TALK)], 448)
    prompt = renderer.render(profile_messages(TALK.utterances("user")), generation_role="assistant").token_ids
    assert row.input_ids[: len(prompt)] == prompt
    assert set(row.labels[: len(prompt)]) == {IGNORED}
    trained = row.labels[len(prompt) :]
    assert trained == row.input_ids[len(prompt) :]
    assert trained[-1] == renderer.end_of_turn_id
    assert parse_profile(renderer.decode(trained)) == ("You are a cook.", "You write tersely.")
    assert sum(row.content) == len(trained) - 1
    assert not row.content[-1]
    assert "THE ASSISTANT" not in renderer.decode(row.input_ids)


@pytest.mark.assets
def test_long_prompts_are_cut_as_at_inference(renderer) -> None:
    long = Dialogue.of([{"role": "user", "content": "why " * 2000}, {"role": "user", "content": "and then?"}])
    (row,) = make_rows(renderer, [(PROFILE, long)], 300)
    assert sum(label == IGNORED for label in row.labels) <= 300
    assert "…\n---\n[User]: and then?\n---\n" in renderer.decode(row.input_ids)


def axes(texts: list[str]) -> np.ndarray:
    known = {"You cook.": (1, 0), "You ramble.": (0.6, 0.8), "You are terse.": (0, 1), "-": (1, 0)}
    return np.array([known[text] for text in texts], np.float32)


def test_likeness_is_the_cosine_of_each_paragraph() -> None:
    people = [Profile(i, "You cook.", "You are terse.") for i in "ab"]
    found = agreement.likeness(axes, people, [ProfileTexts("You ramble.", "You ramble."), None])
    np.testing.assert_allclose(found.objective, [0.6, 0])  # what is no profile counts as nothing in common
    np.testing.assert_allclose(found.subjective, [0.8, 0])
    assert agreement.interval(np.full(5, 0.3)) == pytest.approx((0.3, 0.3))
    low, high = agreement.interval(np.array([0.0, 1.0] * 50))
    assert (round(low, 1), round(high, 1)) == (0.4, 0.6)


def test_voices_are_means_of_turns() -> None:
    talks = [["You cook.", "You are terse."], ["You ramble."]]
    dialogues = [Dialogue.of([{"role": "user", "content": turn} for turn in turns]) for turns in talks]
    np.testing.assert_allclose(agreement.voices(axes, dialogues), [[2**-0.5, 2**-0.5], [0.6, 0.8]], atol=1e-6)


def test_kappas() -> None:
    def person(mark: str) -> Profile:
        traits = {trait: mark for trait in agreement.TRAITS}
        return Profile("a", "You.", "You.", {"subjective_characteristics": {"big_five": traits}})

    one = [person(m) for m in ("high", "high", "low", "low")]
    other = [person(m) for m in ("high", "low", "low", "low")]
    # observed 3/4; by chance 1/2 · 1/4 + 1/2 · 3/4 = 1/2; kappa (3/4 − 1/2) / (1 − 1/2) = 1/2
    assert agreement.kappas(one, other)["openness"] == pytest.approx(0.5)


@pytest.mark.assets
def test_the_table(tmp_path, monkeypatch, capsys) -> None:
    people = [(Profile(i, f"You cook {i}.", "You are terse."), TALK) for i in "abc"]
    monkeypatch.setattr(agreement, "of_split", lambda bank, split: people)
    agreement.main(["--out", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert set(rows) == {"nearest train profile", "another person"}
    assert rows["another person"]["subjective"]["mean"] == pytest.approx(1.0)
    assert rows["another person"]["n"] == 3
    assert "n=   3" in capsys.readouterr().out
