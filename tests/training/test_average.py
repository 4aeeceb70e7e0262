"""The mean of several runs' adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from training import average  # noqa: E402
from usp_env.errors import SpecError  # noqa: E402

LAYER = "base_model.model.model.layers.{}.mlp.up_proj"


@pytest.fixture
def base(tmp_path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, folder: Path, seed: int, alpha: int = 8, layers: tuple[int, ...] = (0, 1)) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["up_proj"], layers_to_transform=list(layers))
    model = peft.get_peft_model(model, settings)
    made = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=made)
    model.save_pretrained(folder)
    return folder


def added(base: Path, folder: Path) -> list[object]:
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    return [model.get_submodule(LAYER.format(layer)).get_delta_weight("default") for layer in (0, 1)]


def test_it_is_the_mean_of_what_each_adds_whatever_their_scales(base, tmp_path) -> None:
    runs = [adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2, alpha=4)]
    average.main([*map(str, runs), "--out", str(tmp_path / "mean"), "--model", str(base), "--rank", "8"])
    for mean, one, other in zip(added(base, tmp_path / "mean"), *(added(base, run) for run in runs), strict=True):
        torch.testing.assert_close(mean, (one + other) / 2, rtol=0.02, atol=0.05)  # kept in bfloat16


def test_a_base_in_a_folder_leaves_its_name_alone(base, tmp_path) -> None:
    average.average([adapter(base, tmp_path / "a", 1)], tmp_path / "mean", str(base), rank=4)
    assert json.loads((tmp_path / "mean" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_a_smaller_rank_keeps_the_largest_singular_values(base, tmp_path) -> None:
    runs = [adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2)]
    average.average(runs, tmp_path / "mean", str(base), rank=3)
    for mean, one, other in zip(added(base, tmp_path / "mean"), *(added(base, run) for run in runs), strict=True):
        kept, wanted = torch.linalg.svdvals(mean), torch.linalg.svdvals((one + other) / 2)
        torch.testing.assert_close(kept[:3], wanted[:3], rtol=0.02, atol=0.05)
        assert wanted[3] > 1
        assert kept[3] < 0.2


def test_adapters_of_other_layers_are_refused(base, tmp_path) -> None:
    runs = [adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2, layers=(0,))]
    with pytest.raises(SpecError, match="expected adapters of the same layers"):
        average.average(runs, tmp_path / "mean", str(base), rank=4)


def test_a_folder_without_an_adapter_is_named_before_anything_is_loaded(tmp_path) -> None:
    with pytest.raises(SpecError, match="nowhere: expected the folder of an adapter"):
        average.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "no-base")])
