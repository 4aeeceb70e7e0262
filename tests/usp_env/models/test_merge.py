"""W + (α / r) B A, as PEFT merges it."""

from __future__ import annotations

import json

import pytest

from usp_env.errors import UspError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
from usp_env.models.merge import merge_adapter  # noqa: E402


def folders(tmp_path, config: dict[str, object], tensors: dict[str, object]):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter, out):
        folder.mkdir()
    weights = {"model.q.weight": torch.eye(2), "model.norm.weight": torch.ones(2)}
    safetensors.save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    (base / "manifest.json").write_text("{}")
    safetensors.save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"} | config)
    )
    return base, adapter, out


def halves(name: str = "q") -> dict[str, object]:
    prefix = f"base_model.model.model.{name}"
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.5]])
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


@pytest.mark.parametrize(("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 4 / 2**0.5)])
def test_hand_computed(tmp_path, config, scale) -> None:
    base, adapter, out = folders(tmp_path, config, halves())
    merge_adapter(base, adapter, out)
    merged = safetensors.load_file(out / "model.safetensors")
    # B A = [[1, 2], [3, 6.5]]
    torch.testing.assert_close(merged["model.q.weight"], torch.eye(2) + scale * torch.tensor([[1.0, 2.0], [3.0, 6.5]]))
    torch.testing.assert_close(merged["model.norm.weight"], torch.ones(2))
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors"]


UNMERGED = [{"alpha_pattern": {"q": 8}}, {"modules_to_save": ["lm_head"]}, {"use_qalora": True}, {"fan_in_fan_out": True}]


@pytest.mark.parametrize(
    "config", [{"peft_type": "IA3"}, {"bias": "all"}, {"use_dora": True}, {"rank_pattern": {"q": 4}}, *UNMERGED]
)
def test_other_adapters_are_refused(tmp_path, config) -> None:
    with pytest.raises(UspError, match="expected plain LoRA"):
        merge_adapter(*folders(tmp_path, config, halves()))


def test_an_adapter_of_another_model_is_refused(tmp_path) -> None:
    with pytest.raises(UspError, match=r"adapts 'model.k.weight', which base does not have"):
        merge_adapter(*folders(tmp_path, {}, halves("k")))


@pytest.mark.parametrize("name", ["base_model.model.lm_head.weight", "base_model.model.model.q.lora_B.bias"])
def test_a_tensor_that_would_be_left_out_is_refused(tmp_path, name) -> None:
    with pytest.raises(UspError, match=rf"expected pairs of lora_A and lora_B alone, left over or missing: {name}$"):
        merge_adapter(*folders(tmp_path, {}, halves() | {name: torch.ones(2)}))


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(tmp_path, half) -> None:
    with pytest.raises(UspError, match=r"missing: base_model.model.model.q.lora_B.weight$"):
        merge_adapter(*folders(tmp_path, {}, {n: t for n, t in halves().items() if half in n}))


def test_it_is_what_peft_merges(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "base")
        lora = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
