"""GGUF to a folder that `transformers` loads: dequantised weights, config, tokenizer with its chat template.

Llama architecture with a byte-level BPE tokenizer, which is what the packaged model is. `transformers` >= 5
can read GGUF itself, but keeps it packed (slow on a CPU, not trainable); hence this one-time conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from usp_env.errors import UspError, require

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3  # GGUF token type of special tokens


def gguf_to_folder(source: Path, folder: Path) -> None:
    """Write `model.safetensors`, `config.json`, `tokenizer.json` and `tokenizer_config.json`.

    Matrices are stored in float16 and loaded in float32, `config.json`'s dtype. The GGUF scales are float16
    themselves; rounding the dequantised values moves a matrix by 2e-4 of its norm, far below what 4 bits did.

    Args:
        source: A `.gguf` file of a Llama model with a GPT-2 style tokenizer.
        folder: An existing folder.

    Raises:
        UspError: The file holds another architecture or tokenizer.
    """
    reader = require("gguf", "hf").GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    kind = (meta.get("general.architecture"), meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise UspError(f"{source}: expected a llama model with the gpt2/smollm tokenizer, got {kind}")
    tensors = _tensors(reader, meta)
    weights = folder / "model.safetensors"
    require("safetensors.numpy", "hf").save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it private; a shared cache needs it readable
    _write_json(folder / "config.json", _config(meta, tied="lm_head.weight" not in tensors))
    _write_json(folder / "tokenizer.json", _tokenizer(meta))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta))


def undo_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order llama.cpp gives q and k: it pairs rotary dimensions (i, i+1), transformers (i, i+d/2).

    Args:
        weight: (heads * d, in_features).
        heads: Number of heads of this projection.

    Example:
        >>> undo_permute(np.arange(4.0)[:, None], heads=1).ravel().tolist()
        [0.0, 2.0, 1.0, 3.0]
    """
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _tensors(reader: Any, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    quants = require("gguf.quants", "hf")
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")  # "blk.0.attn_q" or "token_embd"
        weight = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if parts[-1] in heads:
            weight = undo_permute(weight, heads[parts[-1]])
        name = f"model.layers.{parts[1]}.{_LAYER[parts[2]]}" if parts[0] == "blk" else _OUTER[parts[0]]
        tensors[f"{name}.weight"] = np.ascontiguousarray(weight.astype(np.float16 if weight.ndim == 2 else np.float32))
    return tensors


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(float(meta["llama.attention.layer_norm_rms_epsilon"]), 12),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(meta["llama.rope.freq_base"])},
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i, kind in enumerate(types) if kind == _CONTROL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        # Not GPT2Tokenizer: transformers 5 rebuilds that class's pre-tokenizer and loses the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
