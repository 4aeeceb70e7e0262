"""Attention of few queries over many keys without copying the keys that heads share.

Models with fewer heads of keys than of queries have PyTorch's `sdpa` copy keys and values for every query head at each step where
a batch is padded, which on a CPU takes longer than everything else once the history is long. The queries of the heads that share
a key head are queries over the same keys: side by side along the query's length they need no copy, and give the same sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from usp_env.errors import require

require("torch", "hf")
require("transformers", "hf")
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

NAME = "usp_shared_keys"
FEW = 32
"""Queries of a row up to which keys are shared; with more the copy costs little beside the products."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sdpa` in `transformers`' form, by groups of heads where that is cheaper.

    Args:
        module: The layer.
        query: (B, H, T, D).
        key: (B, G, W, D), H a multiple of G.
        value: As `key`.
        attention_mask: (B or 1, 1 or H, T, W), True or 0.0 where attended; None: all (T = 1) or causal.
        dropout: Of the weights.
        scaling: None: D ** -0.5.
        is_causal: See `transformers`.
        **kwargs: Likewise.

    Returns:
        (B, T, H, D), and no weights.
    """
    rows, heads, length, size = query.shape
    shared = heads // key.shape[1]
    implied = attention_mask is None and length > 1
    each = attention_mask is not None and attention_mask.shape[1] > 1  # a mask for every head
    if shared == 1 or length > FEW or implied or each or dropout or kwargs.get("position_bias") is not None:
        made: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return made
    grouped = query.reshape(rows, key.shape[1], shared * length, size)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, shared, 1)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, length, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def sharing_keys(model: Any) -> Iterator[None]:
    """Within, a model on a CPU that uses `sdpa` attends as above; afterwards it is as it was."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or model.device.type != "cpu":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
