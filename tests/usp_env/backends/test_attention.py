"""Attention by groups of heads is attention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from usp_env.backends import attention  # noqa: E402
from usp_env.backends.attention import FEW, NAME, attend, sharing_keys  # noqa: E402


def tensors(length: int, heads: int = 6, groups: int = 2, width: int = 40) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(length)
    shapes = [(3, heads, length, 8), (3, groups, width, 8), (3, groups, width, 8)]
    return [torch.randn(shape, generator=made) for shape in shapes]


def causal(length: int, width: int = 40) -> torch.Tensor:
    """Rows padded by 0, 5 and 20 on the left."""
    columns, queries = torch.arange(width), torch.arange(width - length, width)
    seen = columns[None, None, None, :] <= queries[None, None, :, None]
    return seen & (columns >= torch.tensor([0, 5, 20])[:, None])[:, None, None, :]


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("length", [1, 2, 7, FEW])
def test_the_same_sums_without_the_copies(length: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors(length)
    mask = causal(length)
    mask = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)  # it must not be asked
    made, weights = attend(module, query, key, value, mask, scaling=0.3)
    assert (made.shape, weights) == ((3, length, 6, 8), None)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)


def test_no_mask_means_everything_for_one_query() -> None:
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    query, key, value = tensors(1)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(attend(module, query, key, value, None, scaling=0.3)[0], expected, rtol=0, atol=2e-6)


def test_what_it_does_not_do_is_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: asked.append(kwargs) or (args[1], None))
    module = SimpleNamespace()
    attend(module, *tensors(FEW + 1), causal(FEW + 1))
    attend(module, *tensors(2, heads=2), causal(2))
    attend(module, *tensors(2), None)  # causal
    attend(module, *tensors(2), causal(2).repeat(1, 6, 1, 1))  # a mask for every head
    attend(module, *tensors(2), causal(2), dropout=0.1)
    attend(module, *tensors(2), causal(2), position_bias=torch.zeros(1))
    assert len(asked) == 6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_is_as_it_was_afterwards(implementation: str) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = implementation
    model = LlamaForCausalLM(config).eval()
    ids, mask = torch.tensor([[0, 0, 7, 8], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        with sharing_keys(model):
            inside = model(input_ids=ids, attention_mask=mask).logits
            used = model.config._attn_implementation
    assert model.config._attn_implementation == implementation
    with pytest.raises(IndexError), torch.no_grad(), sharing_keys(model):
        model(input_ids=ids + 50)
    assert used == (NAME if implementation == "sdpa" else "eager")
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(inside[:, -1], expected[:, -1], rtol=0, atol=1e-5)
