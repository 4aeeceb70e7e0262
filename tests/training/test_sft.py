"""Conditional SFT trains the user's tokens and nothing else (Eq. 4)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from training import perplexity, sft  # noqa: E402
from training.run_directory import arguments, last_checkpoint  # noqa: E402
from training.sft_rows import IGNORED, Limits, Row, clip, make_row, make_rows, system  # noqa: E402
from usp_env.dialogue import Dialogue, Message  # noqa: E402
from usp_env.errors import RunDirectoryError, SpecError, UspError  # noqa: E402
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


def test_no_end_is_trained_where_a_later_segment_goes_on(renderer, tmp_path) -> None:
    from training.conversations import continued, of_split

    ids = ("QWJhYvA_0", "QWJhYvA_9", "QWJhYvA_9#1", "Aa11111_0", "chat_0", "chat_1")
    talk = [{"role": m.role, "content": m.content} for m in TALK]
    lines = [
        {"id": i, "split": "train", "profile": {"objective": "You ask.", "subjective": "You write."}, "conversation": talk}
        for i in ids
    ]
    file = tmp_path / "bank.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert continued(str(file)) == {"QWJhYvA_0", "QWJhYvA_9"}
    rows = make_rows(renderer, of_split(str(file), "train"), continued=continued(str(file)))
    ended = {row.id: trained(renderer, row).endswith("quail eggs?<|im_end|><|endoftext|>") for row in rows}
    assert ended == {
        "QWJhYvA_0": False,
        "QWJhYvA_9": False,
        "QWJhYvA_9#1": True,
        "Aa11111_0": True,
        "chat_0": True,
        "chat_1": True,
    }


@pytest.mark.filterwarnings("default")
def test_the_program_trains_no_end_of_a_continued_conversation(renderer, tmp_path, monkeypatch) -> None:
    people = [(Profile(i, "You cook.", "You write tersely."), TALK) for i in ("a", "b")]
    monkeypatch.setattr(sft, "of_split", lambda bank, split: people)
    monkeypatch.setattr(sft, "continued", lambda bank: {"a"})
    monkeypatch.setattr(sft, "load_model", lambda args: (None, renderer.tokenizer))
    found = []
    monkeypatch.setattr(sft, "fit", lambda model, tokenizer, train, val, args: found.extend(train))
    sft.main(["--out", str(tmp_path)])
    assert [row.labels[-1] == renderer.end_of_conversation_id for row in found] == [False, True]


def test_silver_people_are_trained_on_but_nobody_of_the_gold_bank(renderer, tmp_path, monkeypatch) -> None:
    talk = [{"role": m.role, "content": m.content} for m in TALK]
    prose = {"objective": "You ask.", "subjective": "You write."}

    def bank(name: str, *people: tuple[str, str]) -> str:
        lines = [{"id": i, "split": split, "profile": prose, "conversation": talk} for i, split in people]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return str(tmp_path / name)

    gold = bank("gold.jsonl", ("a", "train"), ("v", "val"))
    found = []
    monkeypatch.setattr(sft, "load_model", lambda args: (None, renderer.tokenizer))
    monkeypatch.setattr(
        sft, "fit", lambda model, tokenizer, train, val, args: found.extend([[r.id for r in train], [r.id for r in val]])
    )
    command = ["--out", str(tmp_path), "--bank", gold, "--silver"]
    sft.main([*command, bank("silver.jsonl", ("s", "train"), ("t", "val"))])
    assert found == [["a", "s"], ["v"]]
    with pytest.raises(SpecError, match="not in .*gold.jsonl.*1 are: 'v'"):
        sft.main([*command, bank("leak.jsonl", ("s", "train"), ("v", "train"))])
    with pytest.raises(SpecError, match="1 are: 'v#2'"):  # a later segment of the same person's conversation
        sft.main([*command, bank("later.jsonl", ("s", "train"), ("v#2", "train"))])
    rows = []
    monkeypatch.setattr(sft, "fit", lambda model, tokenizer, train, val, args: rows.extend(train))
    sft.main([*command, bank("parts.jsonl", ("QWJhYvA_0", "train"), ("QWJhYvA_9", "train"))])  # the first goes on in the second
    ended = {row.id: row.labels[-1] == renderer.end_of_conversation_id for row in rows}
    assert ended == {"a": True, "QWJhYvA_0": False, "QWJhYvA_9": True}


def test_rows_keep_their_limit_with_the_end_of_the_conversation(renderer) -> None:
    whole = len(rows_of(renderer, TALK)[0].input_ids)
    for tokens in range(whole - 6, whole + 1):
        (row,) = rows_of(renderer, TALK, tokens=tokens)
        assert len(row.input_ids) <= tokens
    assert row.labels[-1] == renderer.end_of_conversation_id


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
    for n in (0, 1):
        with pytest.raises(SpecError, match="at least 2 people"):
            perplexity.strangers(n)
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


def test_known_losses_are_of_the_same_tokens_model_and_adapter(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(perplexity, "precision", lambda: {"device": "cpu", "dtype": "float32"})

    def rows(id: str, content: int) -> dict[str, list[Row]]:
        return dict.fromkeys(("profile", "none"), [Row(id, (0,) * 3, (0,) * 3, (True,) * content + (False,) * (3 - content))])

    for name in ("usp", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())

    def settings(adapter: str = "usp", model: str = "m", max_tokens: int = 800) -> dict[str, dict[str, object]]:
        return perplexity.settings(model, max_tokens, {"untuned": None, "usp": tmp_path / adapter})

    file = tmp_path / "known.json"
    held = {"nll": [1.5], "counts": [2.0], "settings": settings()["usp"]}
    file.write_text(json.dumps({"ids": ["a"], "rows": {"usp / none": held, "unasked / none": {}}}))
    found = perplexity.known(file, rows("a", 2), settings())
    assert {name: losses.nll.tolist() for name, losses in found.items()} == {"usp / none": [1.5]}
    assert perplexity.known(None, rows("a", 2), settings()) == {}
    with pytest.raises(SpecError, match="others"):
        perplexity.known(file, rows("b", 2), settings())
    with pytest.raises(SpecError, match="usp / none counts other tokens"):
        perplexity.known(file, rows("a", 3), settings())
    for changed in ({"adapter": "other"}, {"model": "n"}, {"max_tokens": 640}):
        with pytest.raises(SpecError, match="usp / none: expected"):
            perplexity.known(file, rows("a", 2), settings(**changed))
    monkeypatch.setattr(perplexity, "precision", lambda: {"device": "cpu", "dtype": "float16"})
    with pytest.raises(SpecError, match="'dtype': 'float16'.*, got .*'dtype': 'float32'"):
        perplexity.known(file, rows("a", 2), settings())


def test_losses_are_measured_on_a_gpu_where_there_is_one(renderer, monkeypatch) -> None:
    class Model:
        device = torch.device("meta")

        def eval(self) -> None:
            seen.clear()

        def __call__(self, **inputs: object) -> None:
            seen.extend(sorted(name for name, value in inputs.items() if getattr(value, "is_meta", False)))
            raise KeyboardInterrupt

        def to(self, device: str) -> object:
            seen.append(device)
            return self

    seen = []
    with pytest.raises(KeyboardInterrupt):
        perplexity.measure(Model(), rows_of(renderer, TALK))
    assert seen == ["attention_mask", "input_ids", "logits_to_keep"]
    read = {"model": "m", "max_tokens": 800, "adapter": None}
    for there, device, dtype in ((True, "cuda", torch.bfloat16), (False, "cpu", torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(
            transformers.AutoModelForCausalLM, "from_pretrained", lambda folder, dtype: seen.append(dtype) or Model()
        )
        seen.clear()
        perplexity.load(None, "somewhere")
        assert seen == [dtype, device]
        name = str(dtype).removeprefix("torch.")
        assert perplexity.settings("m", 800, {"untuned": None})["untuned"] == read | {"device": device, "dtype": name}


def test_an_adapter_in_the_working_folder_is_not_the_base(monkeypatch) -> None:
    loaded = []
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda folder, **options: tiny())
    monkeypatch.setattr(
        "peft.PeftModel.from_pretrained", lambda base, folder: loaded.append(folder) or _lora(SimpleNamespace(rank=2))
    )
    perplexity.load(None, "somewhere")
    assert loaded == []
    perplexity.load(Path("."), "somewhere")
    assert loaded == [Path(".")]


@pytest.mark.filterwarnings("default")
def test_the_program_prints_its_table(renderer, tmp_path, monkeypatch, capsys) -> None:
    people = [(Profile(f"p{i}", f"You cook {i}.", "You write tersely."), TALK) for i in range(3)]
    monkeypatch.setattr(perplexity, "of_split", lambda bank, split: people)
    monkeypatch.setattr(perplexity, "load", lambda folder, model: tiny().eval())
    monkeypatch.setattr("usp_env.backends.digests.hash_folder", str)
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
@pytest.mark.parametrize("packing", [False, True])
def test_the_validation_weighs_tokens_not_batches(renderer, tmp_path, packing) -> None:
    pytest.importorskip("trl")
    long = Dialogue.of(
        [Message("user", "why is the sky blue and the sea too, in one line please"), Message("assistant", "Light.")]
    )
    rows = [row for talk in (TALK, long, Dialogue(TALK.messages[:2])) for row in rows_of(renderer, talk)]
    options = ["--out", str(tmp_path), "--full", "--batch", "2", "--max-tokens", "200", *["--packing"] * packing]
    args = sft.parser().parse_args(options)
    model = tiny().eval()
    losses = perplexity.measure(model, rows)
    trainer = sft.trainer_class()(
        model=model,
        args=sft.configure(args, max(len(row.input_ids) for row in rows)),
        train_dataset=sft.dataset(rows),
        eval_dataset=sft.dataset(rows, content_only=True),
        processing_class=renderer.tokenizer,
    )
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(losses.nll.sum() / losses.tokens.sum(), rel=1e-5)
    assert found != pytest.approx((losses.nll / losses.tokens).mean(), rel=1e-3)


@pytest.mark.filterwarnings("default")
def test_rows_longer_than_the_packed_length_are_never_cut(renderer, tmp_path) -> None:
    args = sft.parser().parse_args(["--out", str(tmp_path), "--packing", "--max-tokens", "50"])
    assert sft.configure(args, 70).max_length == 70
    assert sft.configure(args, 40).max_length == 50


def test_one_process_writes_what_all_gather(tmp_path) -> None:
    gathered = []
    trainer = SimpleNamespace(is_world_process_zero=lambda: False, save_model=gathered.append)
    sft.save(trainer, SimpleNamespace(out=tmp_path, full=False, model="smollm2-135m"))
    assert gathered == [str(tmp_path / "final")]
    assert list(tmp_path.iterdir()) == []


def _program(renderer: Renderer, monkeypatch: pytest.MonkeyPatch, out: Path) -> list[str]:
    """Eight people, a tiny model, and the options of a short run."""
    monkeypatch.setattr(sft, "load_model", lambda args: (_lora(args), renderer.tokenizer))
    people = [(Profile(f"p{i}", f"You cook {i}.", "You write tersely."), TALK) for i in range(8)]
    monkeypatch.setattr(sft, "of_split", lambda bank, split: people)
    monkeypatch.setattr(sft, "continued", lambda bank: ())
    return ["--out", str(out), "--lr", "0.05", "--batch", "2", "--accumulate", "2", "--eval-every", "4", "--rank", "4"]


@pytest.mark.filterwarnings("default")
def test_the_program_learns_resumes_and_keeps_its_best_step(renderer, tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl")
    options = [*_program(renderer, monkeypatch, tmp_path / "run"), "--epochs", "6"]
    sft.main([*options, "--resume"])  # from nothing, while there is no checkpoint
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert [step for step, _ in record["validation"]] == [0, 4, 8, 12]  # 8 rows, 2 · 2 an update, 6 times
    first, *_, last = [loss for _, loss in record["validation"]]
    untrained = perplexity.measure(tiny(), list(make_rows(renderer, sft.of_split("", "val"))))
    assert first == pytest.approx(untrained.nll.sum() / untrained.tokens.sum(), rel=0.01)  # autocast, here it is float32
    assert record["best"][1] <= last < first - 0.5
    assert record["conversations"] == 8
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert not (tmp_path / "run" / "final" / "training_args.bin").exists()
    state = tmp_path / "run" / "checkpoint-12" / "trainer_state.json"
    held = json.loads(state.read_text())
    next(entry for entry in held["log_history"] if entry["step"] == 12 and "eval_loss" in entry)["eval_seconds"] = 1000.0
    state.write_text(json.dumps(held))
    sft.main([*options, "--resume"])  # there is nothing left to do, and nothing is lost
    again = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    resumed = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (resumed["validation"], resumed["best"]) == (record["validation"], record["best"])
    assert 1000 <= resumed["seconds"] < 1100
    with pytest.raises(RunDirectoryError, match="checkpoints of an earlier run"):
        sft.main(options)
    with pytest.raises(RunDirectoryError, match="no_profile False, now True"):
        sft.main([*options, "--resume", "--no-profile"])


@pytest.mark.filterwarnings("default")
def test_a_run_that_only_gets_worse_says_so(renderer, tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl")
    with pytest.warns(UserWarning, match=r"training made it worse: validation .* untrained"):
        sft.main([*_program(renderer, monkeypatch, tmp_path), "--lr", "20"])
    record = json.loads((tmp_path / "training.json").read_text())
    (start, first), (end, last) = record["validation"]
    assert (start, end) == (0, 2)
    assert record["best"] == [end, last]  # whose weights are kept
    assert last > first


def test_no_other_runs_checkpoint_is_gone_on_from(tmp_path) -> None:
    def args(*options: str) -> object:
        return sft.parser().parse_args(["--out", str(tmp_path), *options])

    assert last_checkpoint(args()) is None
    for step in (4, 12, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"log_history": []}')
    with pytest.raises(RunDirectoryError, match=r"no arguments\.json"):
        last_checkpoint(args("--resume"))
    (tmp_path / "arguments.json").write_text(json.dumps(arguments(args("--reply-tokens", "16", "32"))))
    with pytest.raises(RunDirectoryError, match="checkpoints of an earlier run: take another, or --resume"):
        last_checkpoint(args("--reply-tokens", "16", "32"))
    same = ("--resume", "--reply-tokens", "16", "32", "--gradient-checkpointing")
    assert last_checkpoint(args(*same)) == str(tmp_path / "checkpoint-12")
    with pytest.raises(RunDirectoryError, match=r"other arguments: lr 0\.0005, now 0\.1; no_profile False, now True$"):
        last_checkpoint(args(*same, "--no-profile", "--lr", "0.1"))


@pytest.mark.filterwarnings("default")
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(renderer, tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl")
    options = [*_program(renderer, monkeypatch, tmp_path), "--epochs", "6"]
    sft.main(options)
    whole = json.loads((tmp_path / "training.json").read_text())["validation"]
    for kept in (100, None):  # cut off in its last file, and killed before that
        state = tmp_path / "checkpoint-12" / "trainer_state.json"
        state.write_text(state.read_text()[:kept]) if kept else state.unlink()
        sft.main([*options, "--resume"])
        assert [step for step, _ in json.loads((tmp_path / "training.json").read_text())["validation"]] == [s for s, _ in whole]
        assert json.loads(state.read_text())["global_step"] == 12
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "trainer_state.json").write_text("{")
    assert last_checkpoint(sft.parser().parse_args([*options, "--resume"])) is None
    (tmp_path / "arguments.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="it is damaged"):
        sft.main([*options, "--resume"])


@pytest.mark.filterwarnings("default")
def test_a_run_whose_loss_is_no_number_says_so(renderer, tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl")
    with pytest.raises(UspError, match="every validation loss is NaN or infinite"):
        sft.main([*_program(renderer, monkeypatch, tmp_path), "--lr", "1e38"])
    assert not (tmp_path / "training.json").exists()


def test_nothing_to_learn_from_is_told(renderer, tmp_path, monkeypatch) -> None:
    options = _program(renderer, monkeypatch, tmp_path)
    for wrong, split in (("--limit", "train"), ("--eval-limit", "val")):
        with pytest.raises(SpecError, match=f"no conversation of '{split}'"):
            sft.main([*options, wrong, "0"])


def test_layers_are_a_range_of_the_models() -> None:
    assert sft.layers_of("20-29", 30) == (20, 29)
    for wrong in ("29-20", "0-30", "5", "a-b", "-1-5", "-"):
        with pytest.raises(SpecError, match="--layers"):
            sft.layers_of(wrong, 30)


def test_adapters_have_names_of_their_own() -> None:
    assert perplexity.adapters_of(["a=runs/a", "b=c=d"]) == {"a": Path("runs/a"), "b": Path("c=d")}
    for wrong in (["a"], ["a="], ["=runs/a"], ["untuned=runs/a"], ["a=x", "a=y"], ["a / b=x"]):
        with pytest.raises(SpecError, match="expected NAME=FOLDER, each name once"):
            perplexity.adapters_of(wrong)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch) -> None:
    from training import agreement

    def touched(*args: object) -> None:
        pytest.fail("something was read before")

    monkeypatch.setattr(agreement.embedders, "load", touched)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", touched)
    for file in (tmp_path, tmp_path / "typo" / "x.json"):
        for program, option in ((perplexity, "--out"), (agreement, "--out"), (agreement, "--save")):
            with pytest.raises(SpecError, match="in a folder that is there"):
                program.main([option, str(file)])


def _lora(args: object) -> object:
    import peft

    config = peft.LoraConfig(r=args.rank, lora_alpha=8, target_modules=sft.TARGETS, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
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
