"""The model that a trainer begins with: a packaged adapter over its base, a folder, or a model of the hub."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

from agents.actor_critic import ActorCritic
from usp_env.errors import SpecError, require
from usp_env.models import assets
from usp_env.rendering import Renderer


def load_actor(args: argparse.Namespace, device: Any) -> tuple[ActorCritic, Any]:
    """Policy, reference and critic as `--policy`, `--adapter` and `--full` say, and the tokenizer.

    A packaged adapter is taken as the adapter that it is, not merged, so that what is trained can ship in its place.

    Raises:
        MissingAssetError: A packaged model has not been fetched.
        SpecError: `--full` with an adapter.
    """
    import torch

    transformers = require("transformers", "train")
    asset = assets.ASSETS.get(args.policy)
    adapter: str | None = args.adapter
    folder: str | Path = args.policy
    if asset is not None and asset.base is not None and not args.full:
        if adapter is not None:
            raise SpecError(f"--policy {args.policy} is an adapter already: leave --adapter out, or name its base {asset.base}")
        adapter = str(resources.files("usp_env.models") / asset.member)
        folder = assets.path(asset.base)
    elif asset is not None:
        folder = assets.path(args.policy)
    if args.full and adapter is not None:
        raise SpecError("--full trains a whole model: merge --adapter into it first, or leave --full out")
    dtype = torch.float32 if args.full else torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise SpecError(f"--dtype: expected auto, float32 or bfloat16, got {args.dtype!r}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=None if torch.cuda.is_available() else "eager"
    ).to(device)
    model.eval()  # no dropout: the policy that acts, the one that is scored and the one that learns are the same
    end = Renderer(tokenizer).end_of_conversation_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # of new LoRA matrices: the same in every process, and when a run is begun again
        if args.full:
            return ActorCritic.full(model, tokenizer, end, args.temperature), tokenizer
        return ActorCritic.lora(model, tokenizer, end, adapter, args.rank, args.temperature), tokenizer
