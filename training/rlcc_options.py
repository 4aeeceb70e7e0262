"""The options of `training.rlcc`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from training.learner import Settings


def parser(description: str | None) -> argparse.ArgumentParser:
    """The program's options; those of the update are `training.learner.Settings`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="run directory: checkpoints, metrics.jsonl, dialogues, the adapter")
    made.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")

    who = made.add_argument_group("who speaks")
    who.add_argument("--policy", default="usp-mini-sft", help="a packaged adapter, or a model (packaged, folder, hub id)")
    who.add_argument("--adapter", help="the SFT policy's LoRA adapter over --policy")
    who.add_argument("--full", action="store_true", help="train every weight, with a critic of its own")
    who.add_argument("--rank", type=int, default=16, help="of new LoRA matrices, where there is no SFT adapter to go on with")
    who.add_argument("--dtype", default="auto", help="of the base: auto is bfloat16, on a CPU float32; with --full float32")
    who.add_argument("--assistant", default="smollm2-135m?max_tokens=128", help="the response model, which stays as it is")
    who.add_argument("--kind", default="usp", choices=("usp", "plato"), help="whether the policy reads the profile")

    what = made.add_argument_group("what it is paid for")
    what.add_argument("--lambda", dest="weight", type=float, default=0.8, help="λ of Eq. 6: cycle against human-likeness")
    what.add_argument("--reward", help="any reward expression in the place of λ·cycle + (1−λ)·human")

    play = made.add_argument_group("dialogues")
    play.add_argument("--bank", default="sharegpt")
    play.add_argument("--real-profiles", action="store_true", help="no virtual sampling: people by their density (ablation)")
    play.add_argument("--pool", type=int, default=5000, help="virtual profiles")
    play.add_argument("--pool-from", type=int, default=1000, help="profiles drawn to combine")
    play.add_argument("--updates", type=int, default=100)
    play.add_argument("--dialogues", type=int, default=32, help="of an update, over all processes")
    play.add_argument("--turns", type=int, default=10, help="most user turns")
    play.add_argument("--max-tokens", type=int, default=96, help="of an utterance")
    play.add_argument("--temperature", type=float, default=1.0)
    play.add_argument("--lanes", type=int, default=64, help="most dialogues at a time in a process")
    play.add_argument("--dialogues-every", type=int, default=1, help="write every n-th rollout's dialogues")

    update = made.add_argument_group("the update (training.learner.Settings)")
    kinds = {"int": int, "float": float}
    for field in fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        if field.name == "mode":
            update.add_argument(name, default=field.default, choices=("utterance", "dialogue"))
        else:
            update.add_argument(name, type=kinds[str(field.type)], default=field.default)

    watch = made.add_argument_group("validation, checkpoints, stops")
    watch.add_argument("--validate-every", type=int, default=10, help="updates; 0: never")
    watch.add_argument("--validate-n", type=int, default=16, help="people of the bank's val split")
    watch.add_argument("--checkpoint-every", type=int, default=5, help="updates")
    watch.add_argument("--stop-kl", type=float, default=2.0, help="stop where the KL to the SFT policy passes this, nats a token")
    watch.add_argument("--stop-minutes", type=float, help="stop after so long, over all pieces of the run")
    watch.add_argument("--patience", type=int, default=0, help="stop after so many validations without a better r-DPC; 0: never")
    watch.add_argument("--tracker", action="append", default=[], help="accelerate's: tensorboard, wandb, …")
    return made


def settings(args: argparse.Namespace) -> Settings:
    """The update's hyperparameters."""
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
