"""A LoRA adapter merged into its base: W + (α / r) B A, once, so that every engine loads one plain folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from usp_env.errors import UspError, require

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_KNOWN = ("LORA", "none")  # of `peft_type` and `bias`
# Settings that change what is added to which weight: to overlook one would give another model without a word.
_OTHER = ("use_dora", "use_qalora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")


def merge_adapter(base: Path, adapter: Path, folder: Path) -> None:
    """Write the base's files to a folder, the adapter merged into its weights (which keep their dtype).

    Args:
        base: Holds `model.safetensors` and what belongs to it.
        adapter: A PEFT folder: LoRA on linear layers, one rank and one alpha, no bias and no other trained weights.
        folder: An existing, empty folder.

    Raises:
        UspError: The adapter is of another kind, names weights that the base does not have, or holds any that are no LoRA.
    """
    safetensors = require("safetensors.torch", "hf")
    config = json.loads((adapter / CONFIG).read_text("utf-8"))
    if (config.get("peft_type"), config.get("bias", "none")) != _KNOWN or any(config.get(name) for name in _OTHER):
        odd = {name: config[name] for name in ("peft_type", "bias", *_OTHER) if config.get(name)}
        raise UspError(f"{adapter}: expected plain LoRA of one rank and one alpha without bias, got {odd}")
    scale = config["lora_alpha"] / (np.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    weights = safetensors.load_file(base / "model.safetensors")
    halves = safetensors.load_file(adapter / ADAPTER)
    pairs = {name: name.replace("lora_A", "lora_B") for name in sorted(halves) if name.endswith(".lora_A.weight")}
    if left_over := halves.keys() ^ {*pairs, *pairs.values()}:  # other tensors, and halves without their other half
        raise UspError(f"{adapter}: expected pairs of lora_A and lora_B alone, left over or missing: {min(left_over)}")
    for name, other in pairs.items():
        target = name.removeprefix(_PREFIX).replace(".lora_A.weight", ".weight")
        if target not in weights:
            raise UspError(f"{adapter}: adapts {target!r}, which {base.name} does not have")
        a, b = halves[name].float(), halves[other].float()
        weights[target] = (weights[target].float() + scale * (b @ a)).to(weights[target].dtype)
    for file in base.iterdir():
        if file.name not in ("model.safetensors", "manifest.json") and file.is_file():
            shutil.copyfile(file, folder / file.name)
    safetensors.save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
