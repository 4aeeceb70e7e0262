"""Roll-outs for a trainer: N conversations in lockstep, with what a learner needs from each.

    usp-env fetch
    python examples/03_vector_rollouts.py [--num-envs 8] [--steps 4] [--user usp-mini] [--policy smollm2-135m]

`agents.policies` runs from a checkout: start this from the repository's root.
"""

import argparse
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `agents` stays out of the wheel

from agents.policies import SpeakerPolicy
from usp_env.records import generation_seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--user", default="usp-mini")
    parser.add_argument("--policy", default="smollm2-135m?max_tokens=64")
    parser.add_argument("--record", help="run directory for finished episodes")
    args = parser.parse_args()

    envs = gym.make_vec(
        "usp_env/Assistant-v0", num_envs=args.num_envs, user=args.user, reward=None, max_turns=3, record=args.record
    )
    policy = SpeakerPolicy.load(args.policy)
    start = time.perf_counter()
    observations, infos = envs.reset(seed=0)
    finished, valid, tokens = 0, 0, 0
    for _ in range(args.steps):
        # Each lane's action has noise of its own, rebuilt from the episode alone.
        seeds = [
            generation_seed(int(seed), branch, int(turn), "assistant")
            for seed, branch, turn in zip(infos["episode_seed"], infos["branch"], infos["turn"], strict=True)
        ]
        actions = policy(observations, seeds)
        tokens += sum(len(action.token_ids or ()) for action in actions)
        observations, rewards, terminations, truncations, infos = envs.step(actions)
        ended = np.flatnonzero(terminations | truncations)
        finished += len(ended)
        valid += int(infos["final_info"]["valid"][ended].sum()) if len(ended) else 0
        for lane in ended[:2]:
            last = infos["final_obs"][lane][-1]
            print(f"lane {lane}: {infos['final_info']['end_reason'][lane]}; last {last['role']}: {last['content'][:90]!r}")
    print(f"{finished} episodes, {valid} valid, {tokens} policy tokens in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
