"""Perplexity of real user turns under user models, side by side on the same tokens.

    python -m training.perplexity --adapter usp-mini=runs/usp-mini/final --adapter plato-mini=runs/plato-mini/final --split test

Counted are the content tokens of the user's turns (end tokens apart), each turn after its real context. Rows of a model are the
same conversations with the profile, without, and with the profile of somebody else of the split (a seeded permutation without
fixed points). Intervals are 95 % percentile bootstraps over conversations; those of ratios resample both models' conversations
together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.conversations import of_split
from training.run_directory import check_folders
from training.sft_rows import Limits, Row, clip, make_row
from usp_env.errors import SpecError
from usp_env.models import assets
from usp_env.rendering import Renderer

FloatArray = npt.NDArray[np.float64]


class Losses(NamedTuple):
    """What each of n conversations cost: summed negative log-likelihoods (n,) and counted tokens (n,)."""

    nll: FloatArray
    tokens: FloatArray

    def perplexity(self, members: npt.NDArray[np.intp] | slice = slice(None)) -> float:
        """exp(mean NLL a token) of some of the conversations.

        Example:
            >>> round(Losses(np.log([[2.0], [8.0]]).sum(1) * [3, 1], np.array([3.0, 1.0])).perplexity(), 3)
            2.828
        """
        return float(np.exp(self.nll[members].sum() / self.tokens[members].sum()))


def interval(losses: Losses, other: Losses | None = None, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the perplexity, or of its ratio to another's on the same conversations."""
    rng, n = np.random.default_rng(seed), len(losses.nll)
    members = [rng.integers(n, size=n) for _ in range(draws)]
    values = [losses.perplexity(m) / (other.perplexity(m) if other else 1.0) for m in members]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def strangers(n: int, seed: int = 0) -> npt.NDArray[np.intp]:
    """A permutation of n >= 2 people without fixed points: everybody gets somebody else's profile.

    Raises:
        SpecError: Fewer people.
    """
    if n < 2:
        raise SpecError(f"expected at least 2 people, so that each can have somebody else's profile, got {n}")
    order = np.random.default_rng(seed).permutation(n)
    wrong = np.empty(n, np.intp)
    wrong[order] = np.roll(order, 1)
    return wrong


def measure(model: Any, rows: Sequence[Row], batch: int = 4) -> Losses:
    """Losses of the rows' content tokens under a model, on its device."""
    import torch

    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    nll, count = np.zeros(len(rows)), np.zeros(len(rows))
    for start in range(0, len(rows), batch):
        members = order[start : start + batch]
        length = max(len(rows[i].input_ids) for i in members)
        ids = torch.zeros(len(members), length, dtype=torch.long)
        mask, content = torch.zeros_like(ids), torch.zeros(len(members), length, dtype=torch.bool)
        for k, i in enumerate(members):
            n = len(rows[i].input_ids)
            ids[k, :n], mask[k, :n] = torch.tensor(rows[i].input_ids), 1
            content[k, :n] = torch.tensor(rows[i].content)
        keep = content[:, 1:].any(0).nonzero().squeeze(1)
        ids, mask, content, keep = (tensor.to(model.device) for tensor in (ids, mask, content, keep))
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:][:, keep], reduction="none")
        wanted = content[:, 1:][:, keep]
        nll[members], count[members] = (losses * wanted).sum(1).cpu().numpy(), wanted.sum(1).cpu().numpy()
    return Losses(nll, count)


def variants(renderer: Renderer, split: str, bank: str, n: int | None, limits: Limits) -> dict[str, list[Row]]:
    """Rows with the right profile, without, and with a wrong one; the same turns in all."""
    pairs = of_split(bank, split)[:n]
    wrong = strangers(len(pairs))
    made: dict[str, list[Row]] = {"profile": [], "none": [], "wrong": []}
    for i, (profile, dialogue) in enumerate(pairs):
        clipped = clip(renderer, profile, dialogue, limits)
        shown = {"profile": profile, "none": None, "wrong": pairs[wrong[i]][0]}
        rows = {name: make_row(renderer, who, clipped, profile.id) for name, who in shown.items()}
        if all(rows.values()):
            for name, row in rows.items():
                made[name].append(row)  # type: ignore[arg-type]
    return made


def precision() -> dict[str, str]:
    """Where and in which numbers losses are measured: bfloat16 on a GPU, else float32."""
    import torch

    return {"device": "cuda", "dtype": "bfloat16"} if torch.cuda.is_available() else {"device": "cpu", "dtype": "float32"}


def load(folder: Path | None, model: str) -> Any:
    """The base, or a trained adapter over it, with `precision`; merged, since that is faster on a CPU."""
    import peft
    import torch
    import transformers

    where = assets.path(model) if model in assets.ASSETS else model
    chosen = precision()
    base = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, chosen["dtype"])).to(chosen["device"])
    return peft.PeftModel.from_pretrained(base, folder).merge_and_unload() if folder else base


def ratios(losses: dict[str, Losses]) -> dict[str, dict[str, Any]]:
    """Perplexities over others: trained over untuned, a stranger's profile over one's own, with over without a profile."""
    trained = [name for name in losses if not name.startswith("untuned")]
    pairs = [(name, f"untuned / {name.partition(' / ')[2]}") for name in trained]
    pairs += [(name, name.replace("/ wrong", "/ profile")) for name in losses if name.endswith("/ wrong")]
    pairs += [(a, b) for a in trained for b in trained if a.endswith("/ profile") and b.endswith("/ none")]
    made = {}
    for name, other in pairs:
        if other in losses:
            value = losses[name].perplexity() / losses[other].perplexity()
            made[f"{name} : {other}"] = {"ratio": value, "ci95": interval(losses[name], losses[other])}
    return made


def adapters_of(given: Sequence[str]) -> dict[str, Path | None]:
    """Names and folders of `NAME=FOLDER`.

    Raises:
        SpecError: Another form, a name twice, or one that a row of the table has already.
    """
    found: dict[str, Path | None] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder or " / " in name or name.startswith("untuned") or name in found:
            raise SpecError(f"--adapter {text}: expected NAME=FOLDER, each name once and none that begins with 'untuned'")
        found[name] = Path(folder)
    return found


def settings(model: str, max_tokens: int, folders: Mapping[str, Path | None]) -> dict[str, dict[str, Any]]:
    """What decides the losses under each adapter besides the conversations; of its weights the digest."""
    from usp_env.backends.digests import hash_folder

    same = {"model": model, "max_tokens": max_tokens, **precision()}
    return {name: same | {"adapter": hash_folder(folder) if folder else None} for name, folder in folders.items()}


def known(file: Path | None, rows: Mapping[str, Sequence[Row]], wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Losses]:
    """The losses under the wanted adapters in a file that `--out` wrote.

    Args:
        file: It, or None.
        rows: What is to be measured, by variant.
        wanted: The adapters' `settings`.

    Raises:
        SpecError: It is of other conversations, other tokens of them, or other settings.
    """
    if file is None:
        return {}
    record = json.loads(file.read_text("utf-8"))
    ids = [row.id for row in rows["profile"]]
    if record["ids"] != ids:
        raise SpecError(f"--known {file}: expected losses of the same {len(ids)} conversations, got {len(record['ids'])} others")
    found = {}
    for name, row in record["rows"].items():
        adapter, _, variant = name.rpartition(" / ")
        if adapter not in wanted:
            continue
        if row.get("settings") != wanted[adapter]:
            raise SpecError(f"--known {file}: {name}: expected {dict(wanted[adapter])}, got {row.get('settings')}: leave it out")
        if row["counts"] != [sum(r.content) for r in rows[variant]]:
            raise SpecError(f"--known {file}: {name} counts other tokens of these conversations: leave it out")
        found[name] = Losses(np.array(row["nll"]), np.array(row["counts"]))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; `--out` keeps it as JSON."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="give it again for more")
    made.add_argument("--bank", default="sharegpt")
    made.add_argument("--split", default="val", help="test only for the figures of a released weight")
    made.add_argument("--n", type=int, help="conversations; default: all of the split")
    made.add_argument("--max-tokens", type=int, default=800)
    made.add_argument("--known", type=Path, help="what an earlier --out holds of these adapters is not measured again")
    made.add_argument("--out", type=Path)
    args = made.parse_args(argv)
    check_folders(args.out)
    import transformers

    where = assets.path(args.model) if args.model in assets.ASSETS else args.model
    renderer = Renderer(transformers.AutoTokenizer.from_pretrained(where))
    rows = variants(renderer, args.split, args.bank, args.n, Limits(tokens=args.max_tokens))
    folders: dict[str, Path | None] = {"untuned": None}
    folders |= adapters_of(args.adapter)
    wanted = settings(args.model, args.max_tokens, folders)
    losses = known(args.known, rows, wanted)
    for name, folder in folders.items():
        open_ = [variant for variant in rows if f"{name} / {variant}" not in losses]
        model = load(folder, args.model) if open_ else None
        for variant in open_:
            losses[f"{name} / {variant}"] = measure(model, rows[variant])
            print(f"{name} / {variant}: {losses[f'{name} / {variant}'].perplexity():.2f}", flush=True)
    table = {
        name: {
            "perplexity": cost.perplexity(),
            "ci95": interval(cost),
            "tokens": int(cost.tokens.sum()),
            "n": len(cost.nll),
            "nll": cost.nll.tolist(),
            "counts": cost.tokens.tolist(),
            "settings": wanted[name.rpartition(" / ")[0]],
        }
        for name, cost in losses.items()
    }
    compared = ratios(losses)
    for name, row in table.items():
        print(f"{name:28} {row['perplexity']:7.2f}  [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]")
    for name, ratio in compared.items():
        print(f"{name:52} {ratio['ratio']:.3f}  [{ratio['ci95'][0]:.3f}, {ratio['ci95'][1]:.3f}]")
    if args.out:
        ids = [row.id for row in rows["profile"]]
        record = {"split": args.split, "ids": ids, "rows": table, "ratios": compared}
        args.out.write_text(json.dumps(record) + "\n", "utf-8")


if __name__ == "__main__":
    main()
