"""Which rows are decoded together."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usp_env.backends.batching import batches, padding_worth_a_pass


def test_by_hand() -> None:
    prompts, replies = [10, 100, 40, 90], [5, 5, 5, 5]
    assert list(batches(prompts, replies, 64, 10_000, 70)) == [[1, 3, 2], [0]]  # 0 + 10 + 60 of padding; 90 more are too many
    assert list(batches(prompts, replies, 64, 10_000, 69)) == [[1, 3], [2, 0]]
    assert list(batches(prompts, replies, 1, 10_000, 70)) == [[1], [3], [2], [0]]
    assert list(batches(prompts, replies, 64, 210, 10_000)) == [[1, 3], [2, 0]]
    assert list(batches(prompts, replies, 64, 209, 10_000)) == [[1], [3, 2], [0]]
    assert list(batches([], [], 64, 200, 10)) == []
    # Each row is as wide as the longest prompt and the longest reply: 4 x 1,000 where no row has more than 520 tokens.
    assert list(batches([500, 500, 20, 20], [20, 20, 500, 500], 64, 2100, 10_000)) == [[0, 1], [2, 3]]


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 500)), max_size=60),
    rows=st.integers(1, 64),
    tokens=st.integers(1, 60_000),
    padding=st.integers(0, 10_000),
)
def test_bounds_hold(sizes: list[tuple[int, int]], rows: int, tokens: int, padding: int) -> None:
    prompts, replies = [prompt for prompt, _ in sizes], [reply for _, reply in sizes]
    made = list(batches(prompts, replies, rows, tokens, padding))
    assert sorted(i for batch in made for i in batch) == list(range(len(sizes)))
    for batch in made:
        lengths = [prompts[i] for i in batch]
        assert lengths == sorted(lengths, reverse=True)
        assert len(batch) <= rows
        assert (
            len(batch) == 1 or (lengths[0] + max(replies[i] for i in batch)) * len(batch) <= tokens
        )  # one row alone is tried, however long
        assert sum(lengths[0] - length for length in lengths) <= padding
    heads = [prompts[batch[0]] for batch in made]
    assert heads == sorted(heads, reverse=True)


def test_what_padding_weighs() -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40_000, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) * 2
    states = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads of keys, head size, bytes
    assert padding_worth_a_pass(model) == int(weights / 4 / states)
    assert padding_worth_a_pass(model, share=1e-9) == 1024
