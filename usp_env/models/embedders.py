"""Sentence embedders: text to unit vectors.

`load("auto")` is SimCSE (the paper's) when it lies in the local Hugging Face cache, else the packaged MiniLM.
Nothing is downloaded for `auto`, `minilm` and `simcse`. Needs torch and transformers when loading, not when importing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from usp_env.errors import MissingAssetError, SpecError, UnknownNameError, require
from usp_env.models import assets

SIMCSE = "princeton-nlp/sup-simcse-roberta-large"
BATCH_SIZE = 64

FloatArray = npt.NDArray[np.float32]


class Embedder(Protocol):
    """Turns texts into unit vectors.

    Attributes:
        name: Written into run files and saved samplers.
        dim: Length d of a vector.
    """

    name: str
    dim: int

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Embed `n` texts: (n, d) float32, rows of Euclidean norm 1, in the order of the texts."""
        ...


class _Source(NamedTuple):
    """Where a model lies: `location` is a folder or hub id, `local` forbids the network."""

    name: str
    location: str
    max_tokens: int
    local: bool


class TransformerEmbedder:
    """Mean of a transformer's last hidden states over the text's tokens, scaled to norm 1.

    Args:
        model: A `transformers` encoder in evaluation mode.
        tokenizer: Its tokenizer.
        name: See `Embedder`.
        max_tokens: Texts are cut after this many tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, max_tokens: int) -> None:
        self.name = name
        self.dim = int(model.config.hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        # Rust tokenizers keep truncation as state and raise "Already borrowed" when two threads set it at once.
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Embed `n` texts: (n, d) float32, rows of norm 1."""
        if isinstance(texts, str):
            raise SpecError(f"expected a list of texts, got one str {texts!r:.80}: pass [text]")
        encoded = self._encode(list(texts))
        out = np.empty((len(encoded), self.dim), np.float32)
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            out[rows] = self._forward([encoded[i] for i in rows])
        return out

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        with self._lock:
            ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)["input_ids"]
        return ids

    def _forward(self, batch: list[list[int]]) -> FloatArray:
        import torch

        width = max(len(ids) for ids in batch)
        pad = self._tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in batch], device=self._model.device)
        own_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=self._model.device)
        with torch.inference_mode():
            hidden = self._model(input_ids=input_ids, attention_mask=own_mask).last_hidden_state.float()
            mean = (hidden * own_mask[..., None]).sum(1) / own_mask.sum(1, keepdim=True)
            vectors: FloatArray = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return vectors


def load(name: str = "auto") -> Embedder:
    """The embedder of this name, loaded once a process.

    Args:
        name: `"auto"`; `"minilm"` (packaged all-MiniLM-L6-v2, d = 384, 256 tokens); `"simcse"` (sup-simcse-roberta-large,
            d = 1024, 512 tokens, from the local Hugging Face cache); a folder; or a hub id `owner/model`.

    Raises:
        MissingAssetError: The weights are not on this machine.
        MissingExtraError: torch or transformers is not installed.
        UnknownNameError: Neither a known name, nor a folder, nor a hub id.
    """
    if name == "auto":
        name = "simcse" if _has_simcse() else "minilm"
    return _load(name)


@cache
def _load(name: str) -> Embedder:
    torch, transformers = require("torch", "hf"), require("transformers", "hf")
    source = _source(name)
    try:
        # A checkpoint without a head's weights has them drawn at random: the caller's random state must not move.
        with torch.random.fork_rng(devices=[]):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, local_files_only=source.local)
            model = transformers.AutoModel.from_pretrained(source.location, local_files_only=source.local, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise MissingAssetError(
            f"embedder {name!r}: expected its weights at {source.location!r}, but they cannot be read ({error}); "
            f"`hf download {source.location}` brings a hub model, embedder='minilm' uses the packaged one"
        ) from error
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return TransformerEmbedder(model, tokenizer, source.name, source.max_tokens)


def _source(name: str) -> _Source:
    if name == "minilm":
        return _Source("minilm", str(assets.path("minilm")), 256, True)
    if name == "simcse":
        return _Source("simcse", SIMCSE, 512, True)
    if Path(name).is_dir():
        return _Source(name, name, 512, True)
    if "/" in name:
        return _Source(name, name, 512, assets.offline())
    raise UnknownNameError("embedder", name, ["auto", "minilm", "simcse", "a folder", "a hub id (owner/model)"])


def _has_simcse() -> bool:
    hub = require("huggingface_hub", "hf")
    files = ("model.safetensors", "pytorch_model.bin")
    return isinstance(hub.try_to_load_from_cache(SIMCSE, "config.json"), str) and any(
        isinstance(hub.try_to_load_from_cache(SIMCSE, file), str) for file in files
    )
