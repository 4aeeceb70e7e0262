"""Fitted samplers on disk: an `.npz` of arrays plus one JSON text, never a pickle."""

from __future__ import annotations

import io
import json
import os
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from usp_env.errors import MissingAssetError, SpecError
from usp_env.sampling.kde import FloatArray

FORMAT = 1


def write(path: Path, meta: dict[str, Any], embeddings: FloatArray, coordinates: FloatArray) -> None:
    """Write atomically: readers see the old file or the new one. Equal content gives equal bytes."""
    buffer = io.BytesIO()
    text = json.dumps({"format": FORMAT} | meta)
    np.savez_compressed(buffer, meta=np.array(text), embeddings=embeddings, coordinates=coordinates)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    beside.write_bytes(buffer.getvalue())
    os.replace(beside, path)


def read(path: Path) -> tuple[dict[str, Any], FloatArray, FloatArray]:
    """What `write` wrote: meta, embeddings (n, d), coordinates (n, n_components).

    Raises:
        MissingAssetError: No such file.
        SpecError: Something else than a saved sampler of this format.
    """
    if not path.is_file():
        raise MissingAssetError(
            f"expected a saved sampler, found no file {str(path)!r}: DensitySampler.fit(bank).save(path) writes one"
        )
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            meta, embeddings, coordinates = json.loads(str(file["meta"])), file["embeddings"], file["coordinates"]
        if meta["format"] != FORMAT or coordinates.shape != (len(embeddings), meta["n_components"]):
            raise ValueError(f"format {meta['format']}, coordinates {coordinates.shape}, embeddings {embeddings.shape}")
    except (EOFError, OSError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
        raise SpecError(
            f"{path}: expected a sampler saved by DensitySampler.save (format {FORMAT}), got: {error}; fit again"
        ) from error
    return meta, embeddings, coordinates
