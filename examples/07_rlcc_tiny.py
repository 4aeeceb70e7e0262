"""RLCC on a laptop: for four updates the packaged user learns to be the person it is given. Every quantity is printed.

    usp-env fetch
    python examples/07_rlcc_tiny.py          # a few minutes on two CPU cores

Real runs: `python -m training.rlcc`. `training` runs from a checkout: start this from the repository's root.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `training` and `agents` stay out of the wheel

from agents.speaker import TokenSpeaker, user_prefix
from training.learner import Learner
from training.policies import load_actor
from training.rlcc_options import parser, settings
from training.rollouts import late, roll_out, specs_of
from training.run_log import Clock
from usp_env import assistants
from usp_env.backends.base import Sampling
from usp_env.backends.hf import HFBackend
from usp_env.env import make_conductor
from usp_env.extraction.generator import load_generator
from usp_env.rendering import Renderer
from usp_env.rewards.base import WeightedSum
from usp_env.rewards.cycle import CycleConsistency
from usp_env.rewards.human_likeness import HumanLikeness
from usp_env.sampling import load_sampler

STATS = "kl entropy clip_fraction approx_kl policy_loss value_loss grad_norm critic_grad_norm first_ratio_error".split()


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--updates", type=int, default=4)
    options, generator, read = given.parse_args(), load_generator("profile-generator"), {}

    def reflect(dialogues):
        found = generator.generate(dialogues)
        read.update(zip(map(str, dialogues), found, strict=True))
        return found

    args = parser(None).parse_args(["--out", "-", "--minibatch", "2", "--lr", "1e-4"])
    actor, tokenizer = load_actor(args, "cpu")  # one base; adapters: the policy, its frozen copy, the critic
    learner = Learner(actor, settings(args), Accelerator(cpu=True))
    engine = HFBackend(actor.models["policy"], tokenizer, spec="policy", mutable=True, prefix_gib=1.0)
    speaker = TokenSpeaker(engine, Renderer(tokenizer), user_prefix(), sampling=Sampling(max_tokens=32), adapter="policy")
    partner, sampler = assistants.load("smollm2-135m?max_tokens=32"), load_sampler("sharegpt")
    reward = WeightedSum(((0.8, CycleConsistency(SimpleNamespace(generate=reflect))), (0.2, HumanLikeness())))
    conductor = late(make_conductor(partner, sampler, reward, "user", max_turns=2))
    pool = sampler.sample(64, "virtual", np.random.default_rng(0))  # a real run takes the novelty pool

    for step in range(options.updates):
        clock = Clock()
        play = roll_out(conductor, speaker, specs_of(pool, step, 4, seed=0), clock=clock)  # talk, reflect, score
        stats = learner.update(play.rows, play.credit, step, options.updates)
        engine.forget()  # keys and values of the weights that were
        seconds = {name: took for name, took in {**clock.laps, **stats}.items() if name.endswith("_seconds")}
        print(f"\n── update {step + 1}:", ", ".join(f"{name} {took:.1f}" for name, took in seconds.items()))
        for one in play.scored[:1]:
            for message in one.messages:
                print(f"{message.role:>9}: {message.content!r:.110}")
            for half in ("objective", "subjective"):
                print(f"    given {half}: {getattr(one.profile, half)!r:.110}")
                print(f"reflected {half}: {getattr(read[str(one.dialogue())], half)!r:.110}")
            cc, human = one.reward_terms["cycle"] / 0.8, one.reward_terms["human"] / 0.2
            print(f"cc {cc:.3f}, human {human:.3f}, r_k {np.round(one.utterance_rewards, 3).tolist()}, {one.end_reason}")
        print(f"advantages {stats['advantage']:.3f} ± {stats['advantage_std']:.3f}, {stats['own_tokens']:.0f} own tokens")
        print(", ".join(f"{name} {stats[name]:.4g}" for name in STATS), flush=True)


if __name__ == "__main__":
    main()
