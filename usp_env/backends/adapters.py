"""Adapters over one model: loaded, made active for a call, or several in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from usp_env.errors import MissingAssetError, SpecError, require

BASE = "__base__"
"""PEFT's name of no adapter in a batch of several."""
_SPECIAL = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens")


def add_adapter(model: Any, folder: str, name: str) -> Any:
    """The model with one more adapter, as a `PeftModel`.

    Raises:
        MissingAssetError: The folder holds none.
        SpecError: The model holds adapters without being a `PeftModel`, so that none of them could be left out.
    """
    peft = require("peft", "hf")
    if not Path(folder, "adapter_config.json").is_file():
        raise MissingAssetError(f"expected a PEFT folder with adapter_config.json, got {folder!r}")
    if isinstance(model, peft.PeftModel):
        model.load_adapter(folder, adapter_name=name)
        return model
    if hasattr(model, "peft_config"):
        raise SpecError("expected a transformers model without adapters, or a PeftModel, got a model with load_adapter's own")
    return peft.PeftModel.from_pretrained(model, folder, adapter_name=name)


def active(model: Any) -> str:
    """What a live model speaks through when nobody asks for an adapter: names, or nothing where it has or uses none."""
    if not hasattr(model, "peft_config") or any(layer.disable_adapters for layer in _tuned(model)):
        return ""
    names = model.active_adapters
    return ",".join(names() if callable(names) else names)


@contextlib.contextmanager
def speaking_as(model: Any, name: str | None) -> Iterator[None]:
    """One adapter active (None: none), and afterwards those that were, and which parameters are trained."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = list(model.active_adapters)
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.base_model.set_adapter(name)
            yield
    finally:
        model.base_model.set_adapter(before)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def mixes(model: Any, names: Sequence[str]) -> bool:
    """Whether rows of these adapters may share a batch: plain LoRA, not merged, on a model without experts.

    A layer of an expert sees some tokens of all rows, so that nothing tells it whose they are.
    """
    configs = [model.peft_config[name] for name in names if name != BASE]
    plain = all(c.peft_type == "LORA" and not any(getattr(c, special, None) for special in _SPECIAL) for c in configs)
    experts = any("expert" in key for key in model.config.get_text_config().to_dict())
    return plain and not experts and not any(layer.merged for layer in _tuned(model))


@contextlib.contextmanager
def speaking_each(model: Any, names: Sequence[str | None]) -> Iterator[None]:
    """Row i of every pass speaks through `names[i]` (`BASE`: through none); where the first is None, the model is as it is.

    PEFT's own `adapter_names` does this, too, but leaves its hooks behind where the pass fails.

    Raises:
        RuntimeError: A layer was given something else than the batch's rows.
    """
    if names[0] is None:
        yield
        return
    rows = list(names)

    def name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if len(args[0]) != len(rows):
            raise RuntimeError(f"expected a batch of {len(rows)} rows in every adapted layer, got {len(args[0])}")
        return args, {**kwargs, "adapter_names": rows}

    handles = [layer.register_forward_pre_hook(name, with_kwargs=True) for layer in _tuned(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tuned(model: Any) -> list[Any]:
    kind = require("peft.tuners.tuners_utils", "hf").BaseTunerLayer
    return [module for module in model.modules() if isinstance(module, kind)]
