"""Conditional SFT (paper Eq. 4): a language model learns to speak as the person whose profile it reads.

    python -m training.sft --out runs/usp-mini                      # SmolLM2-135M, LoRA, the packaged bank; an hour on 2 cores
    python -m training.sft --out runs/plato-mini --no-profile       # the profile-free baseline (PlatoLM) on the same turns
    python -m training.sft --out runs/usp-mini --resume             # go on from the last checkpoint
    accelerate launch -m training.sft --model meta-llama/Meta-Llama-3-8B --bank lmsys-usp.jsonl --full --bf16 …

The loss is on the user's tokens alone: content, end of turn, and the end of the conversation after the last reply. Conversations
come from the `sharegpt` package (`usp-env fetch sharegpt`) or, with `--bank FILE`, from the bank's own `conversation` field.
Validation is the mean loss of *content* tokens on the bank's `val` split; the best step's weights are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training.conversations import continued, of_split, silver_of
from training.run_directory import ARGUMENTS, arguments, last_checkpoint, spent
from training.sft_rows import IGNORED, Limits, Row, make_rows
from usp_env.errors import SpecError, UspError
from usp_env.files import write_whole
from usp_env.models import assets
from usp_env.profiles import PACKAGED
from usp_env.rendering import Renderer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    made = training_options(__doc__)
    made.add_argument(
        "--silver", metavar="BANK", help="more people, whose profiles a profile generator wrote: sharegpt-silver, or a JSONL bank"
    )
    made.add_argument("--no-profile", action="store_true", help="PlatoLM: the same turns, no profile")
    made.add_argument("--max-tokens", type=int, default=640, help="longest row; later turns are left out whole")
    made.add_argument("--reply-tokens", type=int, nargs="*", default=[], help="cut replies to lengths drawn from these")
    return made


def training_options(description: str | None) -> argparse.ArgumentParser:
    """The options of every program that fits a language model: what `load_model` and `fit` read."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="run directory: checkpoints, then the adapter or the model")
    made.add_argument("--model", default="smollm2-135m", help="a packaged model, a folder, or a model of the hub")
    made.add_argument("--bank", default="sharegpt", help="sharegpt, or a JSONL bank whose lines hold their conversations")
    made.add_argument("--epochs", type=float, default=1.0)
    made.add_argument("--lr", type=float, default=5e-4)
    made.add_argument("--batch", type=int, default=4, help="rows per step and device")
    made.add_argument("--accumulate", type=int, default=4, help="steps per update")
    made.add_argument("--rank", type=int, default=16, help="of the LoRA matrices")
    made.add_argument("--layers", help="layers that get them, as FIRST-LAST; default: all")
    made.add_argument("--full", action="store_true", help="train every weight, no LoRA")
    made.add_argument("--bf16", action="store_true", help="--full: autocast to bfloat16 (LoRA always does)")
    made.add_argument("--packing", action="store_true", help="several rows in one sequence")
    made.add_argument("--gradient-checkpointing", action="store_true")
    made.add_argument("--limit", type=int, help="train on the first N conversations")
    made.add_argument("--eval-limit", type=int, default=40, help="conversations of the validation")
    made.add_argument("--eval-every", type=int, default=16, help="updates between validations and checkpoints")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--resume", action="store_true")
    return made


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model (with LoRA unless `--full`) and tokenizer.

    A base that is not trained is held in bfloat16; LoRA's own matrices, and every weight of `--full`, are float32.
    """
    import peft
    import torch
    import transformers

    folder = assets.path(args.model) if args.model in assets.ASSETS else args.model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if args.full else torch.bfloat16,
        attn_implementation=None if torch.cuda.is_available() else "eager",  # a step takes 14 % less of a CPU than with sdpa
    )
    if args.full:
        return model, tokenizer
    first, last = layers_of(args.layers, model.config.num_hidden_layers)
    config = peft.LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=TARGETS,
        layers_to_transform=list(range(first, last + 1)),
        task_type="CAUSAL_LM",
    )
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return peft.get_peft_model(model, config), tokenizer


def layers_of(text: str | None, n: int) -> tuple[int, int]:
    """First and last of the layers that are trained.

    Raises:
        SpecError: No range of the model's layers. PEFT would train all for an empty one, without a word.

    Example:
        >>> layers_of("20-29", 30), layers_of(None, 30)
        ((20, 29), (0, 29))
    """
    first, _, last = (text or f"0-{n - 1}").partition("-")
    if first.isdecimal() and last.isdecimal() and int(first) <= int(last) < n:
        return int(first), int(last)
    raise SpecError(f"--layers {text}: expected FIRST-LAST within 0-{n - 1}")


def dataset(rows: Iterable[Row], content_only: bool = False) -> Any:
    """What the trainer reads: `input_ids` and `labels`; validation counts content tokens alone."""
    import datasets

    def labels(row: Row) -> list[int]:
        return [i if not content_only or c else IGNORED for i, c in zip(row.labels, row.content, strict=True)]

    return datasets.Dataset.from_list([{"input_ids": list(row.input_ids), "labels": labels(row)} for row in rows])


def configure(args: argparse.Namespace, longest: int, fresh: bool = True) -> Any:
    """The trainer's settings, for rows of at most `longest` tokens; a fresh run is measured before its first update."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        max_grad_norm=1.0,
        weight_decay=0.0,
        # Rows are cut at whole turns, before: here this is the length that several are packed to.
        max_length=max(longest, getattr(args, "max_tokens", 0)) if args.packing else None,
        packing=args.packing,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.bf16 or not args.full,
        train_sampling_strategy="random" if args.packing else "group_by_length",
        eval_on_start=fresh,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_strategy="steps",
        save_steps=args.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=4,
        use_cpu=not torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": not args.packing},
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        seed=args.seed,
        data_seed=args.seed,
    )


def trainer_class() -> type[Any]:
    """TRL's trainer with a loss that reads the vocabulary's logits at trained positions alone (a fifth of them).

    `eval_loss` is the mean of all counted tokens, not that of the batches' means: a token weighs the same in any batch. With
    several processes, rows that fill up the last batch count twice.
    """
    import torch
    from accelerate.utils import gather_object
    from trl import SFTTrainer

    class UserTurnTrainer(SFTTrainer):
        start = time.time()  # of the run, as if its pieces had followed one another

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            """The trainer's own, with the exact mean loss, and the run's seconds for `spent`."""
            self.costs: list[tuple[float, int]] = []  # summed loss and counted tokens of each batch
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            losses, counts = zip(*gather_object(self.costs), strict=True)
            mean = sum(losses) / max(1, sum(counts))
            # NaN is below nothing and above nothing: a step of it would stay the best one.
            output.metrics[f"{metric_key_prefix}_loss"] = mean if math.isfinite(mean) else math.inf
            output.metrics[f"{metric_key_prefix}_seconds"] = time.time() - self.start
            return output

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """The trainer's own; keeps what `evaluation_loop` sums up."""
            result = super().prediction_step(model, inputs, *args, **kwargs)
            count = int((inputs["labels"][:, 1:] != IGNORED).sum())
            self.costs.append((float(result[0]) * count, count))
            return result

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            """Mean negative log-likelihood of the trained tokens of all steps of an update."""
            labels = inputs["labels"][:, 1:]
            keep = (labels != IGNORED).any(0).nonzero().squeeze(1)
            shown = {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**shown, logits_to_keep=keep, use_cache=False)
            targets = labels[:, keep]
            total = torch.nn.functional.cross_entropy(
                outputs.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # the count is of all processes, and gradients are averaged
            return (loss, outputs) if return_outputs else loss

    return UserTurnTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and keep the best step."""
    args = parser().parse_args(argv)
    model, tokenizer = load_model(args)
    renderer = Renderer(tokenizer)
    limits = Limits(tokens=args.max_tokens, reply_tokens=tuple(args.reply_tokens))
    going_on = continued(args.bank)
    if args.silver and args.bank not in PACKAGED:  # a JSONL bank's silver conversations are the silver file's own
        going_on |= continued(args.silver)
    rows = {}
    for split, limit in (("train", args.limit), ("val", args.eval_limit)):
        pairs = of_split(args.bank, split)[:limit]
        if split == "train" and args.silver:
            pairs += silver_of(args.silver, args.bank)
        rows[split] = list(make_rows(renderer, pairs, not args.no_profile, limits, going_on))
    fit(model, tokenizer, rows["train"], rows["val"], args)


def fit(model: Any, tokenizer: Any, train: Sequence[Row], val: Sequence[Row], args: argparse.Namespace) -> None:
    """Train on rows; the best step's weights and `training.json` go to `args.out`."""
    from peft.helpers import disable_input_dtype_casting

    checkpoint = last_checkpoint(args)
    for split, rows in (("train", train), ("val", val)):
        if not rows:
            raise SpecError(f"--bank {args.bank}: no conversation of {split!r} with anything to learn is left by these options")
    start = time.time() - spent(checkpoint)
    trained = sum(label != IGNORED for row in train for label in row.labels)
    tokens = sum(len(row.input_ids) for row in train)
    print(f"{len(train)} conversations, {tokens} tokens, {trained} of them trained", flush=True)

    trainer = trainer_class()(
        model=model,
        args=configure(args, max(len(row.input_ids) for row in (*train, *val)), fresh=checkpoint is None),
        train_dataset=dataset(train),
        eval_dataset=dataset(val, content_only=True),
        processing_class=tokenizer,
    )
    trainer.start = start
    if checkpoint is None and trainer.is_world_process_zero():
        write_whole(args.out / ARGUMENTS, json.dumps(arguments(args), indent=1) + "\n")
    # LoRA's inputs stay bfloat16, as autocast wants them: 15 % less time a step than through float32, the same loss.
    with contextlib.nullcontext() if args.full else disable_input_dtype_casting(model):
        trainer.train(resume_from_checkpoint=checkpoint)
    save(trainer, args)
    if not trainer.is_world_process_zero():
        return
    curve = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    best = min(curve[1:] or curve, key=lambda pair: pair[1])  # of what is trained: the weights that are kept
    if not math.isfinite(best[1]):
        raise UspError(f"--out {args.out}: every validation loss is NaN or infinite: train with a lower --lr, or without --bf16")
    if best[1] >= curve[0][1]:
        warnings.warn(f"training made it worse: validation {curve[0][1]:.4f} untrained, {best[1]:.4f} at best", stacklevel=2)
    record = {
        "arguments": arguments(args),
        "conversations": len(train),
        "tokens": tokens,
        "trained_tokens": trained,
        "seconds": round(time.time() - start),
        "validation": curve,
        "best": best,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(record["best"]), flush=True)


def save(trainer: Any, args: argparse.Namespace) -> None:
    """The adapter or the model, as safetensors in `out/final`. Every process calls it, one writes."""
    final = args.out / "final"
    trainer.save_model(str(final))  # it gathers what is sharded over processes
    if not trainer.is_world_process_zero():
        return
    (final / "training_args.bin").unlink(missing_ok=True)  # a pickle, of this machine
    if not args.full:
        publish(final, args.model)


def publish(folder: Path, model: str) -> None:
    """Make a saved adapter fit to ship: weights in bfloat16, settings that are set, and among them no folder of this machine."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({name: weight.to(torch.bfloat16) for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    config = {key: value for key, value in json.loads(settings.read_text("utf-8")).items() if value not in (None, {}, [])}
    if model in assets.ASSETS:
        config["base_model_name_or_path"] = assets.ASSETS[model].hub
    elif Path(model).is_dir():
        config["base_model_name_or_path"] = Path(model).resolve().name  # PEFT wants some name
    settings.write_text(json.dumps(config, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
