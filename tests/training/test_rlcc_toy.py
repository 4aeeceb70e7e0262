"""PPO learns where there is something to learn, and nothing where there is not: a letter that is paid for."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
from accelerate import Accelerator  # noqa: E402
from rlcc_world import llama, tokenizer  # noqa: E402

from agents.actor_critic import ActorCritic  # noqa: E402
from agents.speaker import TokenSpeaker  # noqa: E402
from training import rollouts  # noqa: E402
from training.learner import Learner, Settings  # noqa: E402
from usp_env import assistants  # noqa: E402
from usp_env.backends.base import Sampling  # noqa: E402
from usp_env.backends.hf import HFBackend  # noqa: E402
from usp_env.dialogue import Dialogue  # noqa: E402
from usp_env.env import make_conductor  # noqa: E402
from usp_env.profiles import Profile, ProfileBank  # noqa: E402
from usp_env.rendering import Renderer  # noqa: E402
from usp_env.sampling.base import UniformSampler  # noqa: E402

WANTED = "x"
BANK = ProfileBank([Profile("p", "You.", "You.")], "one")


def wanted(profile: Profile, dialogue: Dialogue) -> float:
    """The share of the wanted letter in what was said."""
    said = "".join(dialogue.utterances("user"))
    return said.count(WANTED) / len(said)


class Toy:
    """A model of 31 tokens that says four of them, twice; trained whole or by LoRA."""

    def __init__(self, seed: int, full: bool = True, **settings: object) -> None:
        fast = tokenizer("abcdefghijklmnopqrstuvwxyzĠĊ")
        renderer, model = Renderer(fast), llama(31, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            make = ActorCritic.full if full else ActorCritic.lora
            self.actor = make(model, fast, renderer.end_of_conversation_id)
        given = {"lr": 0.02, "critic_lr": 0.02, "minibatch": 16, "micro": 16, "epochs": 2, "beta": 0.0, "seed": seed}
        self.settings = Settings(**{**given, **settings})
        self.learner = Learner(self.actor, self.settings, Accelerator(cpu=True))
        self.backend = HFBackend(self.actor.models["policy"], fast, spec="toy", mutable=True)
        adapter = self.actor.adapters.get("policy")
        self.speaker = TokenSpeaker(self.backend, renderer, lambda profile: [], sampling=Sampling(max_tokens=4), adapter=adapter)
        self.conductor = make_conductor(
            assistants.load("known-bad"), UniformSampler(BANK), wanted, "user", population="uniform", max_turns=2
        )

    def play(self, step: int) -> rollouts.Play:
        specs = rollouts.specs_of(list(BANK), step, 16, self.settings.seed, "uniform")
        return rollouts.roll_out(self.conductor, self.speaker, specs)

    def train(self, updates: int, permuted: bool = False) -> list[float]:
        """Mean reward of each rollout. Permuted: each dialogue gets another one's credit."""
        rewards = []
        for step in range(updates):
            play = self.play(step)
            rewards.append(float(np.mean([sum(e.rewards) for e in play.scored])))
            credit = list(play.credit)
            if permuted:
                order = np.random.default_rng([self.settings.seed, step]).permutation(len(credit))
                credit = [[float(np.mean(credit[j]))] * len(own) for j, own in zip(order, credit, strict=True)]
            self.stats = self.learner.update(play.rows, credit, step, updates)
            self.backend.forget()
        return rewards


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_paid_letter_is_learnt_in_thirty_updates(seed: int) -> None:
    rewards = Toy(seed).train(30)
    assert np.mean(rewards[:5]) < 0.1
    assert np.mean(rewards[-5:]) > 0.8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_of_other_dialogues_teach_nothing(seed: int) -> None:
    rewards = Toy(seed).train(30, permuted=True)
    assert np.mean(rewards[-5:]) < 0.15


def weights(toy: Toy, part: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in toy.learner.parts[part].items()}


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_an_update_begins_at_ratio_one(full: bool) -> None:
    toy = Toy(0, full=full, critic_warmup=0, minibatch=4, lr=0.05)
    toy.train(2)
    assert toy.stats["first_ratio_error"] < 1e-6
    assert toy.stats["first_clip_fraction"] == 0.0
    assert toy.stats["clip_fraction"] > 0.01  # of all eight minibatches: the weights did move
    assert toy.stats["ratio_error"] > 0.1
    assert toy.stats["behaviour_mismatch"] < 1e-6  # it learns from the very distribution that it sampled from


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_at_rate_zero_the_policy_stays_and_the_critic_learns(full: bool) -> None:
    toy = Toy(0, full=full, critic_warmup=0, lr=0.0)
    before, critic = weights(toy, "policy"), weights(toy, "critic")
    toy.train(2)
    assert toy.stats["grad_norm"] > 0
    assert all(torch.equal(p, before[name]) for name, p in weights(toy, "policy").items())
    assert any(not torch.equal(p, critic[name]) for name, p in weights(toy, "critic").items())


def test_the_critic_goes_first() -> None:
    toy = Toy(0, critic_warmup=1)
    before, critic = weights(toy, "policy"), weights(toy, "critic")
    toy.train(1)
    assert all(torch.equal(p, before[name]) for name, p in weights(toy, "policy").items())
    assert any(not torch.equal(p, critic[name]) for name, p in weights(toy, "critic").items())
