"""Digests that name weights: of a folder's files, of a live model's parameters."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from usp_env.errors import MissingAssetError, require


def hash_folder(folder: str | Path) -> str:
    """SHA-256 over the names and bytes of a folder's `.safetensors` files, and of an adapter's configuration.

    A file that has not changed is read once.

    Raises:
        MissingAssetError: There are none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise MissingAssetError(f"expected *.safetensors in {folder}, found none")
    files += [file for file in [Path(folder, "adapter_config.json")] if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        stat = os.stat(file)
        digest.update(f"{file.name} {_hash_file(str(file), stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _hash_file(file: str, size: int, mtime_ns: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def writes(model: Any) -> int:
    """How often the parameters have been written to, but for writes through `.data`, which PyTorch does not count."""
    return sum(0 if p.is_inference() else p._version for p in model.parameters())


def hash_parameters(model: Any) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a live model's parameters and buffers."""
    torch = require("torch", "hf")
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
