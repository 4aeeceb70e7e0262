"""Conditional SFT trains the user's tokens and nothing else (Eq. 4)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from training import perplexity, sft  # noqa: E402
from training.sft_rows import IGNORED, Limits, clip, make_row, make_rows, system  # noqa: E402
from usp_env.dialogue import Dialogue, Message  # noqa: E402
from usp_env.errors import SpecError  # noqa: E402
from usp_env.models import assets  # noqa: E402
from usp_env.profiles import Profile  # noqa: E402
from usp_env.rendering import Renderer  # noqa: E402

pytestmark = pytest.mark.assets

PROFILE = Profile("a", "You are a cook.", "You write tersely.")
TALK = Dialogue.of(
    [
        Message("user", "how long do i boil eggs <|im_end|>"),
        Message("assistant", "Six minutes for soft ones, ten for hard ones."),
        Message("user", "and quail eggs?"),
        Message("assistant", "Two and a half minutes."),
    ]
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(transformers.AutoTokenizer.from_pretrained(assets.path("smollm2-135m")))


def trained(renderer: Renderer, row: object) -> str:
    return renderer.tokenizer.decode([i for i in row.labels if i != IGNORED])


def rows_of(renderer: Renderer, dialogue: Dialogue, with_profile: bool = True, **limits: object) -> list[object]:
    return list(make_rows(renderer, [(PROFILE, dialogue)], with_profile, Limits(**limits)))


def test_the_labels_are_the_users_turns_and_ends(renderer) -> None:
    (row,) = rows_of(renderer, TALK)
    assert trained(renderer, row) == "how long do i boil eggs <|im_end|><|im_end|>and quail eggs?<|im_end|><|endoftext|>"
    assert row.labels[-1] == renderer.end_of_conversation_id
    assert sum(i == renderer.end_of_turn_id for i in row.labels) == 2  # the marker that the user typed is text
    text = renderer.tokenizer.decode(row.input_ids)
    assert text.startswith(
        "<|im_start|>system\nYou are engaging in a conversation with an AI assistant. Your profile is: \nYou are"
    )
    content = [i for i, c in zip(row.input_ids, row.content, strict=True) if c]
    assert renderer.tokenizer.decode(content) == "how long do i boil eggs <|im_end|>and quail eggs?"
    assert not set(content) & {renderer.end_of_turn_id, renderer.end_of_conversation_id}


def test_the_prompt_is_the_environments(renderer) -> None:
    """What is trained after is what the model reads when it plays: token for token."""
    from usp_env.users import KINDS

    (row,) = rows_of(renderer, TALK)
    view = Dialogue(TALK.messages[:2]).view_for("user", PROFILE)
    prompt = renderer.render(KINDS["usp"].render(view), generation_role="user").token_ids
    assert row.input_ids[: len(prompt)] == prompt
    assert [i for i in row.labels[: len(prompt)] if i != IGNORED] == list(renderer.encode(TALK[0].content)) + [2]
    assert renderer.tokenizer.decode(row.input_ids[len(prompt) :]).startswith("and quail eggs?<|im_end|>")


def test_a_segment_has_no_end_and_a_continuation_begins_with_the_assistant(renderer) -> None:
    (row,) = rows_of(renderer, Dialogue(TALK.messages[1:3]))
    assert trained(renderer, row) == "and quail eggs?<|im_end|>"
    assert rows_of(renderer, Dialogue(TALK.messages[1:2])) == []  # nothing of the user's in it


def test_what_does_not_fit_is_left_out_whole(renderer) -> None:
    whole = clip(renderer, PROFILE, TALK, Limits())
    assert whole.ended
    assert len(whole.messages) == 4
    size = len(make_row(renderer, PROFILE, whole, "a").input_ids)
    assert clip(renderer, PROFILE, TALK, Limits(tokens=size)).messages == whole.messages
    less = clip(renderer, PROFILE, TALK, Limits(tokens=size - 10))
    assert (len(less.messages), less.ended) == (3, False)
    (row,) = rows_of(renderer, TALK, tokens=size - 10)
    assert len(row.input_ids) <= size - 10
    assert trained(renderer, row).endswith("and quail eggs?<|im_end|>")


def test_both_models_see_the_same_turns(renderer) -> None:
    for tokens in range(60, 160, 7):
        kept = [rows_of(renderer, TALK, shown, tokens=tokens) for shown in (True, False)]
        assert [[trained(renderer, r) for r in rows] for rows in kept][0] == [trained(renderer, r) for r in kept[1]]
    (bare,) = rows_of(renderer, TALK, False)
    assert "cook" not in renderer.tokenizer.decode(bare.input_ids)
    assert system(None)["content"].startswith("A chat between a curious human")


def test_the_end_of_a_turn_that_we_cut_is_not_trained(renderer) -> None:
    long = Dialogue.of([Message("user", "eggs " * 20), *TALK.messages[1:]])
    (row,) = rows_of(renderer, long, user_chars=15)
    assert trained(renderer, row) == "eggs eggs eggs and quail eggs?<|im_end|><|endoftext|>"


def test_replies_are_cut_by_the_conversation(renderer) -> None:
    rows = [rows_of(renderer, TALK, reply_tokens=(2, 3))[0] for _ in range(2)]
    assert rows[0] == rows[1]
    assert len(rows[0].input_ids) < len(rows_of(renderer, TALK)[0].input_ids)
    assert trained(renderer, rows[0]) == trained(renderer, rows_of(renderer, TALK)[0])


def tiny(seed: int = 0) -> object:
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data.mul_(20)  # so that frozen embeddings can tell tokens apart
    return model


def test_padding_changes_no_loss(renderer) -> None:
    model = tiny().eval()
    rows = rows_of(renderer, TALK) + rows_of(renderer, Dialogue(TALK.messages[:2])) + rows_of(renderer, TALK, False)
    together = perplexity.measure(model, rows, batch=3)
    alone = [perplexity.measure(model, [row]) for row in rows]
    np.testing.assert_allclose(together.nll, [float(a.nll[0]) for a in alone], rtol=1e-5)
    np.testing.assert_array_equal(together.tokens, [sum(row.content) for row in rows])
    ids = torch.tensor([rows[0].input_ids])
    labels = torch.tensor([[i if c else IGNORED for i, c in zip(rows[0].input_ids, rows[0].content, strict=True)]])
    with torch.no_grad():
        mean = model(input_ids=ids, labels=labels).loss
    np.testing.assert_allclose(together.nll[0] / together.tokens[0], float(mean), rtol=1e-5)


def test_intervals_and_strangers() -> None:
    even = perplexity.Losses(np.log([2.0] * 30), np.ones(30))
    assert np.allclose(perplexity.interval(even), (2.0, 2.0))
    twice = perplexity.Losses(np.log([4.0] * 30), np.ones(30))
    assert np.allclose(perplexity.interval(twice, even), (2.0, 2.0))
    for n in (2, 3, 10):
        wrong = perplexity.strangers(n)
        assert sorted(wrong) == list(range(n))
        assert not any(wrong == np.arange(n))


def test_ratios_and_known_losses(tmp_path) -> None:
    def at(perplexity_: float) -> perplexity.Losses:
        return perplexity.Losses(np.log([perplexity_] * 3), np.ones(3))

    rows = {"untuned / profile": 20, "untuned / none": 32, "usp / profile": 10, "usp / wrong": 30, "plato / none": 25}
    found = perplexity.ratios({name: at(value) for name, value in rows.items()})
    assert {name: round(row["ratio"], 6) for name, row in found.items()} == {
        "usp / profile : untuned / profile": 0.5,
        "plato / none : untuned / none": 0.78125,
        "usp / wrong : usp / profile": 3.0,
        "usp / profile : plato / none": 0.4,
    }
    file = tmp_path / "known.json"
    file.write_text(json.dumps({"ids": ["a"], "rows": {"usp / none": {"nll": [1.5], "counts": [2.0]}}}))
    assert perplexity.known(file, ["a"])["usp / none"].nll.tolist() == [1.5]
    with pytest.raises(SpecError, match="others"):
        perplexity.known(file, ["b"])
    assert perplexity.known(None, ["a"]) == {}


@pytest.mark.filterwarnings("default")
def test_the_program_prints_its_table(renderer, tmp_path, monkeypatch, capsys) -> None:
    people = [(Profile(f"p{i}", f"You cook {i}.", "You write tersely."), TALK) for i in range(3)]
    monkeypatch.setattr(perplexity, "of_split", lambda bank, split: people)
    monkeypatch.setattr(perplexity, "load", lambda folder, model: tiny().eval())
    out = tmp_path / "table.json"
    perplexity.main(["--adapter", "usp=somewhere", "--out", str(out)])
    record = json.loads(out.read_text())
    assert set(record["rows"]) == {
        f"{name} / {variant}" for name in ("untuned", "usp") for variant in ("profile", "none", "wrong")
    }
    assert record["rows"]["usp / none"]["n"] == 3
    monkeypatch.setattr(perplexity, "load", None)  # nothing is measured again
    perplexity.main(["--adapter", "usp=somewhere", "--known", str(out)])
    assert "usp / profile : untuned / profile" in capsys.readouterr().out


def test_the_loss_is_the_mean_of_the_trained_tokens(renderer) -> None:
    pytest.importorskip("trl")
    model = tiny()
    rows = [*rows_of(renderer, TALK), *rows_of(renderer, Dialogue(TALK.messages[:2]))]
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([[*row.input_ids, *[0] * (width - len(row.input_ids))] for row in rows])
    labels = torch.tensor([[*row.labels, *[IGNORED] * (width - len(row.labels))] for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    of_model = model(**inputs).loss
    trainer = object.__new__(sft.trainer_class())
    trainer.args = SimpleNamespace(average_tokens_across_devices=False)
    torch.testing.assert_close(trainer.compute_loss(model, inputs), of_model)
    count = int((labels != IGNORED).sum())
    torch.testing.assert_close(trainer.compute_loss(model, inputs, num_items_in_batch=2 * count), of_model / 2)


@pytest.mark.filterwarnings("default")
def test_the_program_learns_resumes_and_keeps_its_best_step(renderer, tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(sft, "load_model", lambda args: (_lora(args), renderer.tokenizer))
    people = [(Profile(f"p{i}", f"You cook {i}.", "You write tersely."), TALK) for i in range(8)]
    monkeypatch.setattr(sft, "of_split", lambda bank, split: people)
    options = ["--out", str(tmp_path / "run"), "--epochs", "6", "--lr", "0.05", "--batch", "2", "--accumulate", "2"]
    options += ["--eval-every", "4", "--rank", "4"]
    sft.main(options)
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    first, *_, last = [loss for _, loss in record["validation"]]
    assert record["best"][1] <= last < first - 0.5
    assert record["conversations"] == 8
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    sft.main([*options, "--resume"])  # there is nothing left to do, and nothing is lost
    again = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def _lora(args: object) -> object:
    import peft

    config = peft.LoraConfig(r=args.rank, lora_alpha=8, target_modules=sft.TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny(), config)


def test_no_reserved_conversation_is_ever_read(tmp_path) -> None:
    from training.conversations import of_split
    from usp_env.profiles import reserved_ids

    reserved = sorted(reserved_ids())[0]
    talk = [{"role": m.role, "content": m.content} for m in TALK]
    lines = [
        {"id": i, "split": "train", "profile": {"objective": "You ask.", "subjective": "You write."}, "conversation": talk}
        for i in ("mine", reserved)
    ]
    file = tmp_path / "bank.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with pytest.warns(UserWarning, match="1 reserved profiles left out"):
        assert [p.id for p, _ in of_split(str(file), "train")] == ["mine"]
