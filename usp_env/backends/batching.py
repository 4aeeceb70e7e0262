"""Which rows are decoded together. A row costs what the batch's longest does, a batch costs a pass over the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def batches(prompts: Sequence[int], replies: Sequence[int], rows: int, tokens: int, padding: int) -> Iterator[list[int]]:
    """Cut rows into batches whose prompts are of similar length; the longest first, so that memory fails early.

    Args:
        prompts: Tokens of each row's prompt.
        replies: Most tokens of each row's reply.
        rows: Most rows of a batch.
        tokens: Most tokens of a batch, each row as wide as the longest prompt and the longest reply together.
        padding: Most tokens of padding before a batch's prompts.

    Yields:
        Indices of rows.

    Example:
        >>> list(batches([90, 2000, 100, 1900, 80], [10] * 5, rows=64, tokens=65_536, padding=200))
        [[1, 3], [2, 0, 4]]
    """
    batch: list[int] = []
    longest = reply = padded = 0
    for i in sorted(range(len(prompts)), key=lambda i: -prompts[i]):
        wide = (longest + max(reply, replies[i])) * (len(batch) + 1) > tokens
        if batch and (wide or len(batch) >= rows or padded + longest - prompts[i] > padding):
            yield batch
            batch, reply, padded = [], 0, 0
        if not batch:
            longest = prompts[i]
        batch.append(i)
        reply, padded = max(reply, replies[i]), padded + longest - prompts[i]
    if batch:
        yield batch


def padding_worth_a_pass(model: Any, share: float = 0.25) -> int:
    """Tokens of padding whose keys and values weigh `share` of the model: reading them at every step costs about a pass.

    Args:
        model: A `transformers` causal language model.
        share: Of the weights' bytes. A quarter, since attention copies and masks what it reads.

    Returns:
        At least 1,024: a pass has costs of its own, however small the model.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return max(1024, int(share * weights / states))
