"""The environment in both seats, with scripted speakers: no model, no download.

python examples/01_scripted_env.py
"""

import gymnasium as gym

import usp_env


def show(observation: tuple[dict[str, str], ...]) -> None:
    for message in observation:
        print(f"  {message['role']:>9}: {message['content'][:100]}")


def assistant_seat() -> None:
    print("You are the assistant; the user is the dynamics.")
    env = gym.make("usp_env/Assistant-v0", user="scripted", reward=None)
    observation, info = env.reset(seed=7, options={"population": "minority"})
    over = False
    while not over:
        observation, reward, terminated, truncated, info = env.step("Good question. Here is what I would do.")
        over = terminated or truncated
    show(observation)
    print(f"  ended: {info['end_reason']} after {info['turn']} user turns, outcome {info['outcome']}\n")


def user_seat() -> None:
    print("You are the user; your profile is the system message.")
    env = gym.make("usp_env/User-v0", assistant="scripted", reward=None)
    observation, info = env.reset(seed=7)
    for text in ("hi, can you help me with a garden?", f"perfect, that is all i needed {usp_env.END}"):
        observation, reward, terminated, truncated, info = env.step(text)
    show(observation)
    print(f"  ended: {info['end_reason']}; the agent was {info['target_profile'].id}\n")


def many_at_once() -> None:
    print("64 conversations in lockstep, one batched call a turn.")
    envs = gym.make_vec("usp_env/Assistant-v0", num_envs=64, user="scripted", reward=None)
    envs.reset(seed=0)
    finished = 0
    for _ in range(5):
        _, _, terminations, truncations, infos = envs.step(["Tell me more."] * 64)
        finished += int((terminations | truncations).sum())
    print(f"  {finished} conversations came to an end in 5 steps")


if __name__ == "__main__":
    assistant_seat()
    user_seat()
    many_at_once()
