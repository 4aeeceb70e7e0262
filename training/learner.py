"""One PPO update: from rows and credits to new weights. What is random here hangs on (seed, step) alone.

    learner = Learner(actor, Settings(), accelerator)
    stats = learner.update(rows, credit, step=0, of=100)

Several processes hold different dialogues and the same weights. Sums over own tokens, their counts and gradients are added over
processes, so that an update does not depend on how many there are (but for the order of additions). Gradients are added here and
not by DistributedDataParallel, whose hooks expect one forward pass of one set of weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.actor_critic import ActorCritic, Part, Rows, scatter
from agents.rows import Row
from training import ppo
from training.run_log import Clock
from usp_env.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Settings:
    """Hyperparameters; defaults are the reference's (rates are those of LoRA, some 20 times those of a full fine-tune).

    Args:
        mode: See `training.ppo`.
        gamma: γ.
        lam: λ of GAE.
        beta: Weight of the KL penalty in the reward.
        clip: ε of the ratio.
        value_clip: ε of the values.
        epochs: Passes over a rollout.
        minibatch: Dialogues of an optimiser step, over all processes.
        micro: Dialogues of a forward pass.
        lr: Rate of the policy.
        critic_lr: Rate of the critic and its head.
        critic_warmup: First updates in which the policy stays as it is.
        lr_warmup: Share of the run in which rates rise; then a cosine to a tenth.
        max_grad_norm: Of the policy's gradient, and of the critic's.
        seed: Of the order of dialogues.
    """

    mode: ppo.Mode = "utterance"
    gamma: float = 1.0
    lam: float = 0.95
    beta: float = 0.01
    clip: float = 0.2
    value_clip: float = 0.2
    epochs: int = 1
    minibatch: int = 8
    micro: int = 2
    lr: float = 1e-5
    critic_lr: float = 1e-4
    critic_warmup: int = 1
    lr_warmup: float = 0.03
    max_grad_norm: float = 1.0
    seed: int = 0


class Learner:
    """Moves an actor and its critic.

    Args:
        actor: Policy, reference, critic.
        settings: Hyperparameters.
        accelerator: `accelerate.Accelerator`: device, autocast, sums over processes.
    """

    def __init__(self, actor: ActorCritic, settings: Settings, accelerator: Any) -> None:
        self.actor, self.settings, self.accelerator = actor, settings, accelerator
        self.parts: dict[Part, dict[str, torch.nn.Parameter]] = {part: actor.trained(part) for part in ("policy", "critic")}
        self.rates = {"policy": settings.lr, "critic": settings.critic_lr}
        self.optimizers = {
            part: torch.optim.AdamW(list(named.values()), lr=self.rates[part], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
            for part, named in self.parts.items()
        }

    def update(self, rows: Sequence[Row], credit: Sequence[Sequence[float]], step: int, of: int) -> dict[str, float]:
        """Learn from one rollout.

        Args:
            rows: This process's dialogues; it may have none.
            credit: Of each, one r_k for each utterance.
            step: Number of the update, from 0.
            of: Updates of the run, which the rates are scheduled over.

        Returns:
            What happened, over all processes; every key is there in every update.

        Raises:
            TrainingError: A loss or a gradient was not finite; the weights are those before the step that found it.
        """
        clock = Clock()
        batch = self.prepare(rows, credit)
        stats = batch.stats(self._sum)
        clock.lap("log_prob_seconds")
        steps: list[dict[str, float]] = []
        for epoch in range(self.settings.epochs):
            for chosen in self._minibatches(len(rows), step, epoch, credit):
                steps.append(self._step(batch, chosen, step, of))
        for key in dict.fromkeys(key for one in steps for key in one):
            stats[key] = float(np.mean([one[key] for one in steps]))
        if steps:
            stats["first_ratio_error"], stats["first_clip_fraction"] = steps[0]["ratio_error"], steps[0]["clip_fraction"]
        clock.lap("update_seconds")
        return stats | clock.laps

    def prepare(self, rows: Sequence[Row], credit: Sequence[Sequence[float]]) -> Prepared:
        """Everything that is computed once, before the weights move: old, reference, values, advantages, returns."""
        if not rows:
            return Prepared.empty(self.accelerator.device, self._sum)
        whole = Rows.of(rows, self.accelerator.device)
        old, reference, values, spread = (torch.zeros_like(whole.behaviour) for _ in range(4))
        with torch.no_grad():
            for chosen in _micro(sorted(range(len(rows)), key=lambda i: len(rows[i].token_ids)), self.settings.micro):
                part = Rows.of([rows[i] for i in chosen], self.accelerator.device)
                at, width = torch.tensor(chosen, device=whole.own.device), part.own.shape[1]
                found, entropies = self._log_probs(part, "policy")
                old[at, :width], spread[at, :width] = found, entropies
                reference[at, :width] = self._log_probs(part, "ref")[0]
                with self.actor.using("critic"), self.accelerator.autocast():
                    values[at, :width] = self.actor.values(part)
        settings = self.settings
        kl = ppo.kl_estimate(old, reference, "k1")
        rewards = ppo.token_rewards(credit, whole.utterance_ids, kl, settings.beta, settings.mode)
        advantages, returns = ppo.gae(
            rewards, values, whole.own, whole.utterance_ids, settings.gamma, settings.lam, settings.mode
        )
        whitened = ppo.whiten(advantages, whole.own, self._sum(ppo.moments(advantages, whole.own)))
        return Prepared(list(rows), whole, old, reference, values, spread, whitened, returns)

    def _log_probs(self, rows: Rows, part: Part) -> tuple[Tensor, Tensor]:
        with self.actor.using(part), self.accelerator.autocast():
            return self.score(rows, part)

    def score(self, rows: Rows, part: Part = "policy") -> tuple[Tensor, Tensor]:
        """Log-probabilities of own tokens and entropies, (B, T) each; call it inside `actor.using(part)`."""
        logits = self.actor.logits(rows, part)
        banned = rows.banned[rows.own]
        chosen = ppo.chosen_log_probs(logits, rows.token_ids[rows.own], banned, self.actor.end_id)
        with torch.no_grad():
            spread = ppo.entropy(logits, banned, self.actor.end_id)
        return scatter(chosen, rows.own), scatter(spread, rows.own)

    # ── one optimiser step ───────────────────────────────────────────────────────────────────────

    def _minibatches(self, n: int, step: int, epoch: int, credit: Sequence[object]) -> Iterator[list[int]]:
        """Dialogues of each optimiser step; every process makes equally many, some perhaps empty."""
        most = int(self._max(n))
        share = max(1, self.settings.minibatch // self.accelerator.num_processes)
        order = np.random.default_rng([self.settings.seed, step, epoch, self.accelerator.process_index]).permutation(n)
        for part in np.array_split(order, math.ceil(most / share)) if most else []:
            yield [int(i) for i in part]

    def _step(self, batch: Prepared, chosen: Sequence[int], step: int, of: int) -> dict[str, float]:
        own = torch.tensor(float(sum(batch.rows[i].own for i in chosen)), device=self.accelerator.device)
        count = max(1.0, float(self._sum(own)))
        sums = torch.zeros(5, dtype=torch.float64, device=self.accelerator.device)
        ratio_error = 0.0
        warming = step < self.settings.critic_warmup
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for part in _micro(sorted(chosen, key=lambda i: len(batch.rows[i].token_ids)), self.settings.micro):
            rows, view = batch.part(part, self.accelerator.device)
            if not warming:
                with self.actor.using("policy"):
                    with self.accelerator.autocast():
                        log_probs, _ = self.score(rows)
                    found = ppo.policy_loss(log_probs, view["old"], view["advantages"], rows.own, self.settings.clip, count)
                    found.loss.backward()
                sums[:3] += torch.stack([found.loss.detach(), found.clip_fraction, found.approx_kl]).double()
                ratio_error = max(ratio_error, float(found.ratio_error))
            with self.actor.using("critic"):
                with self.accelerator.autocast():
                    values = self.actor.values(rows)
                loss = ppo.value_loss(values, view["values"], view["returns"], rows.own, self.settings.value_clip, count)
                loss.loss.backward()
            sums[3:5] += torch.stack([loss.loss.detach(), loss.clip_fraction]).double()
        moving: tuple[Part, ...] = ("critic",) if warming else ("policy", "critic")
        norms = self._move(moving, step, of)
        policy, clipped, kl, critic, value_clipped = self._sum(sums).tolist()
        return {
            "policy_loss": policy,
            "clip_fraction": clipped,
            "approx_kl": kl,
            "ratio_error": self._max(ratio_error),
            "value_loss": critic,
            "value_clip_fraction": value_clipped,
            "grad_norm": norms.get("policy", 0.0),
            "critic_grad_norm": norms["critic"],
        }

    def _move(self, parts: Sequence[Part], step: int, of: int) -> dict[Part, float]:
        """Add the processes' gradients, clip each part's norm once, and step; the norms before the clip."""
        gradients = {part: self._gradient(part) for part in parts}
        norms = {part: float(gradient.norm()) for part, gradient in gradients.items()}
        if wrong := [f"the {part}'s gradient is {norm}" for part, norm in norms.items() if not math.isfinite(norm)]:
            raise TrainingError(
                f"update {step + 1}: {' and '.join(wrong)}, expected finite numbers; no weight was changed by this step. Go on "
                "from the last checkpoint with a lower rate, or look for NaN in the rewards and for a dtype that overflows"
            )
        for part, gradient in gradients.items():
            gradient *= min(1.0, self.settings.max_grad_norm / (norms[part] + 1e-6))
            parameters = list(self.parts[part].values())
            for p, own in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                p.grad = own.view_as(p).to(p.dtype)
            for group in self.optimizers[part].param_groups:
                group["lr"] = self.rates[part] * rate(step, of, self.settings.lr_warmup)
            self.optimizers[part].step()
            self.optimizers[part].zero_grad(set_to_none=True)
        return norms

    def _gradient(self, part: Part) -> Tensor:
        """Of all its parameters in a row, summed over processes, float32."""
        parameters = self.parts[part].values()
        return self._sum(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters]))

    def _sum(self, x: Tensor) -> Tensor:
        found: Tensor = self.accelerator.reduce(x, "sum") if self.accelerator.num_processes > 1 else x
        return found

    def _max(self, x: float) -> float:
        if self.accelerator.num_processes == 1:
            return float(x)
        return float(self.accelerator.gather(torch.tensor([float(x)], device=self.accelerator.device)).max())


@dataclass
class Prepared:
    """A rollout that is ready to be learnt from; tensors are (B, T)."""

    rows: list[Row]
    whole: Rows | None
    old: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def empty(cls, device: Any, total: Any) -> Prepared:
        """Of a process without a valid dialogue; it takes part in every sum, on its own device."""
        none = torch.zeros(0, 0, device=device)
        total(none.new_zeros(3, dtype=torch.float64))  # its `ppo.moments`
        return cls([], None, *(none for _ in range(6)))

    def part(self, chosen: Sequence[int], device: Any) -> tuple[Rows, Mapping[str, Tensor]]:
        """Some dialogues, cut to their longest."""
        rows = Rows.of([self.rows[i] for i in chosen], device)
        at, width = torch.tensor(list(chosen), device=self.old.device), rows.own.shape[1]
        names = ("old", "values", "advantages", "returns")
        return rows, {name: getattr(self, name)[at, :width] for name in names}

    def stats(self, total: Any) -> dict[str, float]:
        """Means over own tokens of all processes."""
        own = self.old.bool() if self.whole is None else self.whole.own
        behaviour = self.old if self.whole is None else self.whole.behaviour
        kl = ppo.kl_estimate(self.old, self.reference)
        sums = [self.old, kl, ppo.kl_estimate(self.old, self.reference, "k3"), self.entropy, (self.old - behaviour).abs()]
        sums += [self.values, self.returns, self.returns.square(), (self.returns - self.values).square()]
        found = total(torch.stack([x[own].double().sum() for x in sums] + [own.sum().double()]))
        *means, _ = (found / found[-1].clamp(min=1)).tolist()
        logp, k1, k3, spread, mismatch, value, mean_return, squares, error = means
        variance, residual = squares - mean_return**2, error - (mean_return - value) ** 2
        return {
            "own_tokens": float(found[-1]),
            "log_prob": logp,
            "kl": k1,
            "kl_k3": k3,
            "entropy": spread,
            "behaviour_mismatch": mismatch,
            "value": value,
            "return": mean_return,
            "advantage": mean_return - value,  # before it is whitened
            "advantage_std": max(0.0, residual) ** 0.5,
            "explained_variance": 1 - residual / variance if variance > 1e-12 else float("nan"),
        }


def rate(step: int, of: int, warmup: float = 0.03) -> float:
    """Factor of the learning rate at an update: it rises to 1 over the first share of the run, then falls along a cosine to 0.1.

    Example:
        >>> rate(0, 100), rate(3, 100), round(rate(99, 100), 2)
        (0.3333333333333333, 1.0, 0.1)
    """
    rising = max(1, round(warmup * of))
    if step < rising:
        return (step + 1) / rising
    done = min(1.0, (step - rising) / max(1, of - 1 - rising))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def _micro(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield list(order[start : start + size])
