"""One adapter out of several runs': the mean of what they add to the base, cut to one rank (a "model soup").

    python -m training.average runs/usp-mini/final runs/usp-mini-silver/final --out runs/usp-mini-average

Runs that begin at the same base and differ in data or passes end near each other, and their mean is often better than each of
them (Wortsman et al. 2022, arXiv:2203.05482), at no cost in use. `training.perplexity` on `val` tells whether it is here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from training.sft import publish
from usp_env.errors import SpecError
from usp_env.models import assets

NAME = "default"  # PEFT writes this adapter to the folder itself, others to folders of their names


def average(folders: Sequence[Path], out: Path, model: str, rank: int) -> None:
    """Write the mean of LoRA adapters over one base.

    Args:
        folders: Adapters, of the same layers.
        out: Where the mean is written, in bfloat16.
        model: The base: a packaged model, a folder, or a model of the hub.
        rank: Of the mean: by its largest singular values, the nearest matrices of that rank.

    Raises:
        SpecError: A folder holds no adapter, or the adapters train different layers.
    """
    if missing := [str(folder) for folder in folders if not (folder / "adapter_config.json").is_file()]:
        raise SpecError(f"{', '.join(missing)}: expected the folder of an adapter, as training.sft leaves in OUT/final")
    import peft
    import transformers

    where = assets.path(model) if model in assets.ASSETS else model
    names = [f"run{i}" for i in range(len(folders))]
    mean = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(where), folders[0], names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        mean.load_adapter(folder, name)
    layers = [{k for k in mean.state_dict() if f".{name}." in k} for name in names]
    if any({k.replace(name, names[0]) for k in own} != layers[0] for name, own in zip(names, layers, strict=True)):
        raise SpecError(f"expected adapters of the same layers, got {', '.join(map(str, folders))}")
    mean.add_weighted_adapter(names, [1 / len(names)] * len(names), NAME, combination_type="svd", svd_rank=rank)
    mean.save_pretrained(out, selected_adapters=[NAME], save_embedding_layers=False)  # none is trained; "auto" asks the hub
    publish(out, model)


def main(argv: Sequence[str] | None = None) -> None:
    """Average the adapters named."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folders", type=Path, nargs="+")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--model", default="smollm2-135m", help="their base")
    made.add_argument("--rank", type=int, default=16)
    args = made.parse_args(argv)
    average(args.folders, args.out, args.model, args.rank)


if __name__ == "__main__":
    main()
