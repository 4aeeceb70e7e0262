"""RLCC: reinforcement learning with cycle consistency (paper §4.3): a user simulator learns to be the person it is given.

    python -m training.rlcc --out runs/rlcc                        # usp-mini-sft on virtual profiles, λ = 0.8
    python -m training.rlcc --out runs/rlcc --resume               # go on from the last checkpoint
    accelerate launch --num_processes 2 -m training.rlcc …         # each process plays its share of the dialogues

One update:

    profiles   virtual ones from the novelty pool        OF of one person, SC of another, unlike anybody in the bank
    rollout    the policy speaks as the user, a frozen response model answers (`usp_env/User-v0`)
    rewards    Eq. 5: what a profile generator reads out of the user's turns, held against the given profile; Eq. 6: and P(human)
    update     PPO with a critic and a KL penalty to the SFT policy (`training.ppo`, `training.learner`)

`metrics.jsonl` has one line for each update: reward, its terms, KL, what `training.guards` watches, seconds of each part. SIGTERM
finishes the update, writes a checkpoint and ends with the command that goes on.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from agents.speaker import TokenSpeaker, user_prefix
from training import rollouts
from training.checkpoints import Checkpoints, load_optimizer, optimizer_tensors
from training.guards import consistencies, guards, reward_terms
from training.learner import Learner
from training.policies import load_actor
from training.rlcc_options import parser, settings
from training.run_directory import arguments, begin
from training.run_log import Clock, RunLog
from training.sft import publish
from usp_env import assistants
from usp_env.backends.base import Sampling
from usp_env.backends.hf import HFBackend
from usp_env.driver import Conductor
from usp_env.env import make_conductor
from usp_env.episode import Episode
from usp_env.errors import TrainingError, UspError
from usp_env.evaluation.scorers import Scorers
from usp_env.evaluation.scorers import load as load_scorers
from usp_env.models.assets import ASSETS
from usp_env.records import EpisodeSpec
from usp_env.rendering import Renderer
from usp_env.sampling import load_sampler

FREE = ("out", "resume", "stop_minutes", "stop_kl", "patience", "tracker", "lanes", "dialogues_every", "checkpoint_every")
"""Options that may differ when a run goes on."""


class Rlcc:
    """A run.

    Args:
        args: `training.rlcc_options.parser`'s.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision="bf16" if args.full and torch.cuda.is_available() else "no",
            cpu=not torch.cuda.is_available(),
            log_with=args.tracker or None,
            project_dir=str(args.out),
        )
        self.checkpoints = Checkpoints(args.out / "checkpoints")
        begin(args, FREE, self.main)
        self.log = RunLog(args.out, self.accelerator)
        self.actor, tokenizer = load_actor(args, self.accelerator.device)
        self.learner = Learner(self.actor, settings(args), self.accelerator)
        renderer = Renderer(tokenizer)
        self.backend = HFBackend(self.actor.models["policy"], tokenizer, spec="policy", mutable=True, prefix_gib=1.0)
        sampling = Sampling(temperature=args.temperature, max_tokens=args.max_tokens)
        self.speaker = TokenSpeaker(
            self.backend, renderer, user_prefix(args.kind), "user", sampling, self.actor.adapters.get("policy")
        )
        self.scorers: Scorers = load_scorers()
        self.weights = {} if args.reward else {"cycle": args.weight, "human": 1 - args.weight}
        self.conductor = self._conductor("train")
        sampler: Any = self.conductor.sampler
        self.pool = (
            rollouts.real_people(sampler, args.seed, args.pool)
            if args.real_profiles
            else rollouts.virtual_pool(sampler, args.seed, args.pool_from, args.pool)
        )
        self.validation = self._conductor("val") if args.validate_every else None
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "best": None, "stale": 0}
        self.stopping = ""

    def _conductor(self, split: str) -> Conductor:
        reward = self.args.reward or "+".join(f"{weight:g}*{name}" for name, weight in self.weights.items() if weight)
        assistant, sampler = assistants.load(self.args.assistant), load_sampler(self.args.bank, split)
        return rollouts.late(make_conductor(assistant, sampler, reward, "user", max_turns=self.args.turns))

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return bool(self.accelerator.is_main_process)

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Train until the updates are done or a stop is met."""
        args = self.args
        self._resume()
        if args.tracker:
            self.accelerator.init_trackers(
                "rlcc", config={k: v for k, v in arguments(args).items() if isinstance(v, str | int | float)}
            )
        signal.signal(signal.SIGTERM, lambda *_: self._stop("SIGTERM"))
        started = time.monotonic() - self.state["seconds"]
        if self.state["step"] == 0 and args.validate_every:
            self.log.note(0, {"step": 0, **self.validate()})
        while self.state["step"] < args.updates and not self.stopping:
            step = self.state["step"]
            record = self.update(step)
            self.state |= {"step": step + 1, "seconds": time.monotonic() - started}
            if args.validate_every and (step + 1) % args.validate_every == 0:
                record |= self.validate()
            self.log.note(step + 1, record)
            self._look(record)
            if (step + 1) % args.checkpoint_every == 0 or self.stopping or step + 1 == args.updates:
                self._checkpoint()
        if self.main:
            self._save(args.out / "final")
            print(self.stopping or "done", flush=True)
            if self.state["step"] < args.updates:
                print(f"to go on: python -m training.rlcc {' '.join(_without_resume(sys.argv[1:]))} --resume", flush=True)
        self.accelerator.end_training()

    def update(self, step: int) -> dict[str, float]:
        """One update; what is known of it."""
        args, clock = self.args, Clock()
        population = "density" if args.real_profiles else "virtual"
        specs = rollouts.specs_of(self.pool, step, args.dialogues, args.seed, population)
        mine = specs[self.accelerator.process_index :: self.accelerator.num_processes]
        play = rollouts.roll_out(self.conductor, self.speaker, mine, args.lanes, clock)
        if step % args.dialogues_every == 0:
            self.log.keep(step, play.episodes, {"user": "policy", "assistant": self.conductor.partner.spec})
        if not (total := int(sum(gather_object([len(play.rows)])))):
            causes = "; ".join(sorted({str(e.error) for e in play.episodes if e.error})) or dict(play.outcomes)
            raise TrainingError(
                f"update {step}: none of {len(specs)} dialogues may be learnt from ({causes}); mend the response model or the "
                f"reward, then --resume: {args.out} holds every update before this one"
            )
        stats = self.learner.update(play.rows, play.credit, step, args.updates)
        self.backend.forget()
        clock.skip()
        everyone: list[Episode] = gather_object(list(play.episodes))
        scored = [episode for episode in everyone if episode.outcome == "completed"]
        found = {"step": step + 1, "dialogues": len(everyone), "learnt": total, "invalid": sum(not e.valid for e in everyone)}
        if self.main:
            found |= reward_terms(scored, self.weights) | guards(scored, self.scorers)
        clock.lap("guard_seconds")
        return found | stats | clock.laps

    def validate(self) -> dict[str, float]:
        """The policy on people of `val`, the same ones with the same noise each time; every process plays its share."""
        if self.validation is None:
            return {}
        rng = np.random.default_rng([self.args.seed, 3])
        people = rng.permutation(len(self.validation.sampler.bank))[: self.args.validate_n]
        specs = [EpisodeSpec(self.validation.sampler.bank[int(i)].id, "uniform", int(rng.integers(2**53))) for i in people]
        mine = specs[self.accelerator.process_index :: self.accelerator.num_processes]
        everyone: list[Episode] = gather_object(
            list(rollouts.roll_out(self.validation, self.speaker, mine, self.args.lanes).episodes)
        )
        scored = sorted((e for e in everyone if e.outcome == "completed"), key=lambda e: e.id)
        means = {name: float(np.nanmean(values)) for name, values in consistencies(scored, self.scorers).items()}
        found = {**means, **reward_terms(scored, self.weights), **guards(scored, self.scorers)}
        return {f"val_{name}": value for name, value in found.items()} | {"val_n": len(scored)}

    # ── stops ────────────────────────────────────────────────────────────────────────────────────

    def _stop(self, why: str) -> None:
        self.stopping = self.stopping or why

    def _look(self, record: Mapping[str, float]) -> None:
        args = self.args
        if record["kl"] > args.stop_kl:
            self._stop(f"stopped: KL {record['kl']:.3f} nats a token, --stop-kl {args.stop_kl}")
        if args.stop_minutes and self.state["seconds"] > 60 * args.stop_minutes:
            self._stop(f"stopped: {args.stop_minutes:g} minutes are over")
        if (now := record.get("val_r_dpc")) is not None:
            better = self.state["best"] is None or now > self.state["best"]
            self.state |= {"best": now, "stale": 0} if better else {"stale": self.state["stale"] + 1}
            if better and self.main:
                self._save(args.out / "best")
            if args.patience and self.state["stale"] >= args.patience:
                self._stop(f"stopped: r-DPC on val has not risen for {args.patience} validations")
        self.stopping = next((why for why in gather_object([self.stopping]) if why), "")  # a signal reaches one process first

    # ── files ────────────────────────────────────────────────────────────────────────────────────

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        if self.main:
            self.log.cut(-1 if found is None else found.state["step"])
        if found is None:
            return
        self.state |= {key: found.state[key] for key in self.state}
        weights = found.tensors("weights")
        for part, named in self.learner.parts.items():
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(weights[f"{part}|{name}"])
            load_optimizer(self.learner.optimizers[part], list(named), found.tensors(f"{part}_optimizer"))
        self.backend.forget()
        if self.main:
            print(f"goes on after update {self.state['step']}", flush=True)

    def _checkpoint(self) -> None:
        if self.main:
            parts = self.learner.parts
            weights = {f"{part}|{name}": p for part, named in parts.items() for name, p in named.items()}
            moments = {
                f"{part}_optimizer": optimizer_tensors(self.learner.optimizers[part], list(named))
                for part, named in parts.items()
            }
            self.checkpoints.save(self.state["step"], {"weights": weights, **moments}, self.state)
        self.accelerator.wait_for_everyone()

    def _save(self, folder: Path) -> None:
        """The policy: an adapter in bfloat16, or the whole model."""
        model = self.actor.models["policy"]
        if self.args.full:
            model.save_pretrained(folder)
            return
        model.save_pretrained(folder, selected_adapters=["policy"])
        made = folder / "policy"
        for file in made.iterdir():
            file.replace(folder / file.name)
        made.rmdir()
        asset = ASSETS.get(self.args.policy)
        publish(folder, asset.base or asset.name if asset else self.args.policy)


def _without_resume(words: Sequence[str]) -> list[str]:
    return [word for word in words if word != "--resume"]


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = parser(__doc__).parse_args(argv)
    try:
        Rlcc(args).run()
    except UspError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
