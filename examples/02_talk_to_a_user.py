"""A packaged assistant talks with a packaged simulated user, and you see who the user was.

usp-env fetch
python examples/02_talk_to_a_user.py [--user usp-mini] [--assistant smollm2-135m] [--population minority] [--turns 3]
"""

import argparse
import textwrap

import gymnasium as gym

from usp_env import assistants
from usp_env.dialogue import Dialogue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", default="usp-mini")
    parser.add_argument("--assistant", default="smollm2-135m")
    parser.add_argument("--population", default="minority")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    env = gym.make("usp_env/Assistant-v0", user=args.user, reward=None, max_turns=args.turns)
    assistant = assistants.load(args.assistant)
    observation, info = env.reset(seed=args.seed, options={"population": args.population})
    profile = env.unwrapped.episode.profile  # hidden from the agent; shown here for the reader
    print(textwrap.fill(str(profile), 100), "\n")
    over = False
    while not over:
        view = Dialogue.of(observation).view_for("assistant")
        reply = assistant.respond([view], [args.seed + info["turn"]])[0]
        observation, reward, terminated, truncated, info = env.step(reply.text)
        over = terminated or truncated
    for message in observation:
        print(textwrap.fill(f"{message['role']}: {message['content']}", 100, subsequent_indent="    "))
    print(f"\nended: {info['end_reason']}, outcome {info['outcome']}, tokens {info['usage']}")


if __name__ == "__main__":
    main()
