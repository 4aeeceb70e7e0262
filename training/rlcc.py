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

import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from agents.speaker import TokenSpeaker, user_prefix
from training import rollouts
from training.checkpoints import Checkpoints, load_optimizer, optimizer_tensors, whole
from training.guards import consistencies, guards, mean, reward_terms
from training.learner import Learner
from training.policies import load_actor
from training.rlcc_options import parser, settings
from training.run_directory import arguments, begin
from training.run_log import Clock, RunLog
from training.sft import publish
from usp_env import assistants, backends
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
from usp_env.rollout import roll
from usp_env.sampling import Sampler, load_sampler

FREE = ("out", "resume", "stop_minutes", "stop_kl", "patience", "tracker", "lanes", "dialogues_every", "checkpoint_every")
"""Options that may differ when a run goes on."""


class Rlcc:
    """A run.

    Args:
        args: `training.rlcc_options.parser`'s.
    """

    def __init__(self, args: Any) -> None:
        self.args, self.stopping, self.signal = args, "", ""
        signal.signal(signal.SIGTERM, self._signalled)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if args.full and torch.cuda.is_available() else "no",
            cpu=not torch.cuda.is_available(),
            log_with=args.tracker or None,
            project_dir=str(args.out),
        )
        self.checkpoints = Checkpoints(args.out / "checkpoints")
        self._write(lambda: begin(args, FREE))
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
        sampler = load_sampler(args.bank)
        self.conductor = self._conductor(sampler)
        self.pool = (
            rollouts.real_people(sampler, args.seed, args.pool)
            if args.real_profiles
            else rollouts.virtual_pool(sampler, args.seed, args.pool_from, args.pool)
        )
        self.validation = self._conductor(rollouts.people_of(args.bank, "val")) if args.validate_every else None
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "best": None, "stale": 0}

    def _conductor(self, sampler: Sampler) -> Conductor:
        reward = self.args.reward or "+".join(f"{weight:g}*{name}" for name, weight in self.weights.items() if weight)
        assistant, population = assistants.load(self.args.assistant), sampler.populations[0]
        made = make_conductor(assistant, sampler, reward, "user", population=population, max_turns=self.args.turns)
        return rollouts.late(made)

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return bool(self.accelerator.is_main_process)

    def _write(self, work: Callable[[], object], by_all: bool = False) -> None:
        """What one process writes for all; where it cannot, every process raises: none is left waiting for the others."""
        failure: Exception | None = None
        if self.main or by_all:
            try:
                work()
            except UspError as error:
                failure = error
            except OSError as error:
                failure = TrainingError(f"{self.args.out} cannot be written ({error}); mend that, then --resume")
        for found in gather_object([failure]):
            if found is not None:
                raise found

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────

    def run(self) -> bool:
        """Train until the updates are done or a stop is met; whether they are done."""
        args = self.args
        self._resume()
        if args.tracker:
            told = {key: value for key, value in arguments(args).items() if isinstance(value, str | int | float)}
            self.accelerator.init_trackers("rlcc", config=told)
        started = time.monotonic() - self.state["seconds"]
        self._agree()
        if self.state["step"] == 0 and args.validate_every and not self.stopping:
            first = {"step": 0, **self.validate()}
            self._write(lambda: self.log.note(0, first))
            self._compare(first)
        while self.state["step"] < args.updates and not self.stopping:
            step = self.state["step"]
            record = self.update(step)
            self.state |= {"step": step + 1, "seconds": time.monotonic() - started}
            if args.validate_every and (step + 1) % args.validate_every == 0:
                record |= self.validate()
            self._write(lambda: self.log.note(self.state["step"], record))  # noqa: B023 - called at once
            self._look(record)
            if (step + 1) % args.checkpoint_every == 0 or self.stopping or step + 1 == args.updates:
                self._write(self._checkpoint)
        self._write(lambda: self._save(args.out / "final"))
        self.accelerator.end_training()
        return bool(self.state["step"] >= args.updates)

    def update(self, step: int) -> dict[str, float]:
        """One update; what is known of it."""
        args, clock = self.args, Clock()
        population = "density" if args.real_profiles else "virtual"
        specs = rollouts.specs_of(self.pool, step, args.dialogues, args.seed, population)
        mine = specs[self.accelerator.process_index :: self.accelerator.num_processes]
        play = rollouts.roll_out(self.conductor, self.speaker, mine, args.lanes, clock)
        if step % args.dialogues_every == 0:
            speakers = {"user": "policy", "assistant": self.conductor.partner.spec}
            self._write(lambda: self.log.keep(step + 1, play.episodes, speakers), by_all=True)
        if not (total := int(sum(gather_object([len(play.rows)])))):
            causes = "; ".join(sorted({str(e.error) for e in play.episodes if e.error})) or dict(play.outcomes)
            raise TrainingError(
                f"update {step + 1}: none of {len(specs)} dialogues may be learnt from ({causes}); mend the response model or "
                "the reward, then --resume from the last checkpoint"
            )
        stats = self.learner.update(play.rows, play.credit, step, args.updates)
        self._forget()
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
        played = roll(self.validation, self.speaker, mine, self.args.lanes)
        rollouts.score(self.validation, played)
        self.speaker.forget()
        self._forget()
        everyone: list[Episode] = gather_object(played)
        scored = sorted((e for e in everyone if e.outcome == "completed"), key=lambda e: e.id)
        means = {name: mean(values) for name, values in consistencies(scored, self.scorers).items()}
        found = {**means, **reward_terms(scored, self.weights), **guards(scored, self.scorers)}
        return {f"val_{name}": value for name, value in found.items()} | {"val_n": len(scored)}

    # ── stops ────────────────────────────────────────────────────────────────────────────────────

    def _signalled(self, *_: object) -> None:
        self.signal = "SIGTERM"

    def _stop(self, why: str) -> None:
        self.stopping = self.stopping or why

    def _agree(self) -> None:
        """A signal reaches each process at another moment, or one alone: all of them stop after the same update."""
        self.stopping = next((why for why in gather_object([self.stopping or self.signal]) if why), "")

    def _look(self, record: Mapping[str, float]) -> None:
        args = self.args
        if record["kl"] > args.stop_kl:
            self._stop(f"stopped: KL {record['kl']:.3f} nats a token, --stop-kl {args.stop_kl}")
        if args.stop_minutes and self.state["seconds"] > 60 * args.stop_minutes:
            self._stop(f"stopped: {args.stop_minutes:g} minutes are over")
        self._compare(record)
        if args.patience and self.state["stale"] >= args.patience:
            self._stop(f"stopped: r-DPC on val has not risen for {args.patience} validations")
        self._agree()

    def _compare(self, record: Mapping[str, float]) -> None:
        """Keep the policy with the best validation; the one that training begins with is the first to beat."""
        now = record.get("val_r_dpc", float("nan"))
        if not np.isfinite(now):  # no validation, or nobody could be scored: that tells nothing
            return
        if self.state["best"] is None or now > self.state["best"]:
            self.state |= {"best": now, "stale": 0}
            self._write(lambda: self._save(self.args.out / "best"))
        else:
            self.state["stale"] += 1

    # ── files ────────────────────────────────────────────────────────────────────────────────────

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        self._write(lambda: self.log.cut(-1 if found is None else found.state["step"]))
        if found is None:
            return
        self.state |= {key: found.state[key] for key in self.state}
        weights = found.tensors("weights")
        for part, named in self.learner.parts.items():
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(weights[f"{part}|{name}"])
            load_optimizer(self.learner.optimizers[part], list(named), found.tensors(f"{part}_optimizer"))
        if self.main:
            print(f"goes on after update {self.state['step']}", flush=True)

    def _checkpoint(self) -> None:
        parts = self.learner.parts
        weights = {f"{part}|{name}": p for part, named in parts.items() for name, p in named.items()}
        moments = {
            f"{part}_optimizer": optimizer_tensors(self.learner.optimizers[part], list(named)) for part, named in parts.items()
        }
        self.checkpoints.save(self.state["step"], {"weights": weights, **moments}, self.state)

    def _save(self, place: Path) -> None:
        """The policy: an adapter in bfloat16, or the whole model."""
        model, asset = self.actor.models["policy"], ASSETS.get(self.args.policy)
        with whole(place) as folder:
            if self.args.full:
                model.save_pretrained(folder)
                return
            model.save_pretrained(folder, selected_adapters=["policy"])
            for file in (folder / "policy").iterdir():
                file.replace(folder / file.name)
            (folder / "policy").rmdir()
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a card, not filled in
            publish(folder, asset.base or asset.name if asset else self.args.policy)

    def _forget(self) -> None:
        """Drop what engines keep of dialogues that are over: what is computed next hangs on nothing that was played before."""
        for engine in (self.backend, *backends.loaded()):
            if isinstance(engine, HFBackend):
                engine.forget()


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser(__doc__).parse_args(words)
    try:
        run = Rlcc(args)
        done = run.run()
    except UspError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if run.main:
        print(run.stopping or "done", flush=True)
    if run.main and not done:
        n = run.accelerator.num_processes
        program = ["python"] if n == 1 else ["accelerate", "launch", "--num_processes", str(n)]
        again = [*program, "-m", "training.rlcc", *(word for word in words if word != "--resume"), "--resume"]
        print(f"to go on: {shlex.join(again)}", flush=True)


if __name__ == "__main__":
    main()
