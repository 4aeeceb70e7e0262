"""Sentence embedders: text to unit vectors.

`load("auto")` is SimCSE (the paper's) when it lies in the local Hugging Face cache, else the packaged MiniLM.
Nothing is downloaded for `auto`, `minilm` and `simcse`. Needs torch and transformers when loading, not when importing.

A vector is the mean over a text's tokens, or what a sentence-transformers checkpoint says in its `modules.json` (mean or first
token, and how many tokens are read). SimCSE's repository says nothing: mean over tokens, as in the USP authors' scripts.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from usp_env.errors import MissingAssetError, SpecError, UnknownNameError, require
from usp_env.models import assets
from usp_env.models.features import check_unicode

SIMCSE = "princeton-nlp/sup-simcse-roberta-large"
STYLE = "AnnaWegmann/Style-Embedding"
BATCH_SIZE = 64

FloatArray = npt.NDArray[np.float32]
Pooling = Literal["mean", "cls"]


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


class _Layout(NamedTuple):
    """What a sentence-transformers checkpoint says of itself: how to pool, the most tokens (0: nothing), the encoder's folder."""

    pooling: Pooling = "mean"
    max_tokens: int = 0
    subfolder: str = ""


class TransformerEmbedder:
    """A transformer's last hidden states, pooled over the text's tokens and scaled to norm 1.

    Args:
        model: A `transformers` encoder in evaluation mode.
        tokenizer: Its tokenizer.
        name: See `Embedder`.
        max_tokens: Texts are cut after this many tokens.
        pooling: `mean` over the text's tokens, or `cls`, the first token's state.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, max_tokens: int, pooling: Pooling = "mean") -> None:
        self.name = name
        self.dim = int(model.config.hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._pooling = pooling
        # Rust tokenizers keep truncation as state and raise "Already borrowed" when two threads set it at once.
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Embed `n` texts: (n, d) float32, rows of norm 1."""
        if isinstance(texts, str):
            raise SpecError(f"expected a list of texts, got one str {texts!r:.80}: pass [text]")
        check_unicode(texts)
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
            # A row is padded on the right: its first token is its own.
            mean = (hidden * own_mask[..., None]).sum(1) / own_mask.sum(1, keepdim=True)
            pooled = hidden[:, 0] if self._pooling == "cls" else mean
            vectors: FloatArray = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return vectors


def load(name: str = "auto") -> Embedder:
    """The embedder of this name, loaded once a process.

    Args:
        name: `"auto"`; `"minilm"` (packaged all-MiniLM-L6-v2, d = 384, 256 tokens); `"simcse"` (sup-simcse-roberta-large,
            d = 1024, 512 tokens, from the local Hugging Face cache); `"style-wegmann"` (AnnaWegmann/Style-Embedding, d = 768, 512
            tokens: how a text is written); a folder; or a hub id `owner/model`.

    Raises:
        MissingAssetError: The weights are not on this machine.
        MissingExtraError: torch or transformers is not installed.
        SpecError: A sentence-transformers checkpoint with modules that are not known here.
        UnknownNameError: Neither a known name, nor a folder, nor a hub id.
    """
    if name == "auto":
        name = "simcse" if _has_simcse() else "minilm"
    return _load(name)


@cache
def _load(name: str) -> Embedder:
    torch, transformers = require("torch", "hf"), require("transformers", "hf")
    source = _source(name)
    layout = _layout(source)
    where = {"local_files_only": source.local, "subfolder": layout.subfolder}
    try:
        # A checkpoint without a head's weights has them drawn at random: the caller's random state must not move.
        with torch.random.fork_rng(devices=[]):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **where)
            model = transformers.AutoModel.from_pretrained(source.location, dtype=torch.float32, **where)
    except assets.unreadable() as error:
        known = f"; `hf download {source.location}` brings a hub model, embedder='minilm' uses the packaged one"
        raise MissingAssetError(
            f"embedder {name!r}: expected its weights at {source.location!r}, but they cannot be read ({error})"
            f"{assets.mend(source.location) or known}"
        ) from error
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    most = min(source.max_tokens, layout.max_tokens or source.max_tokens)
    return TransformerEmbedder(model, tokenizer, source.name, most, layout.pooling)


def _source(name: str) -> _Source:
    if name == "minilm":
        return _Source("minilm", str(assets.path("minilm")), 256, True)
    if name == "simcse":
        return _Source("simcse", SIMCSE, 512, True)
    if name == "style-wegmann":
        return _Source(name, STYLE, 512, assets.offline())
    if Path(name).is_dir():
        return _Source(name, name, 512, True)
    if "/" in name:
        return _Source(name, name, 512, assets.offline())
    raise UnknownNameError("embedder", name, ["auto", "minilm", "simcse", "style-wegmann", "a folder", "a hub id (owner/model)"])


def _layout(source: _Source) -> _Layout:
    modules = _read(source, "modules.json")
    if modules is None:
        return _Layout()
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    pooling = (_read(source, f"{kinds['Pooling']}/config.json") or {}) if "Pooling" in kinds else {}
    modes = sorted(key for key, value in pooling.items() if key.startswith("pooling_mode") and value is True)
    # Dense layers and other poolings would need weights and arithmetic that are not here; scaling to norm 1 is done anyway.
    known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if set(kinds) - {"Transformer", "Pooling", "Normalize"} or len(modes) != 1 or modes[0] not in known:
        raise SpecError(
            f"embedder {source.name!r}: expected a sentence-transformers model of Transformer, Pooling (mean or first token) and "
            f"perhaps Normalize, got {', '.join(kinds)} with {' and '.join(modes) or 'no pooling'}"
        )
    folder = kinds.get("Transformer", "")
    limit = (_read(source, f"{folder}/sentence_bert_config.json".lstrip("/")) or {}).get("max_seq_length")
    return _Layout(known[modes[0]], int(limit or 0), folder)


def _read(source: _Source, file: str) -> Any:
    """A JSON file of a checkpoint; None where it has none, or none that is here."""
    path = Path(source.location, file)
    if not Path(source.location).is_dir():
        hub = require("huggingface_hub", "hf")
        try:
            path = Path(hub.hf_hub_download(source.location, file, local_files_only=source.local))
        except (hub.errors.EntryNotFoundError, hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError):
            return None  # where it is the repository that is not here, loading its weights will say so
        except OSError as error:
            raise MissingAssetError(f"embedder {source.name!r}: {source.location}/{file} cannot be fetched ({error})") from error
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _has_simcse() -> bool:
    hub = require("huggingface_hub", "hf")
    files = ("model.safetensors", "pytorch_model.bin")
    return isinstance(hub.try_to_load_from_cache(SIMCSE, "config.json"), str) and any(
        isinstance(hub.try_to_load_from_cache(SIMCSE, file), str) for file in files
    )
