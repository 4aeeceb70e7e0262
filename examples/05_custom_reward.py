"""A reward of your own: write a function, name it, use the name in an expression. No model, no download.

python examples/05_custom_reward.py
"""

import gymnasium as gym

import usp_env

POLITE = ("please", "thank", "glad", "happy to", "sorry", "welcome")
REPLIES = ("What do you want?", "I am glad you ask. Could you tell me more, please?", "Thank you, that helps. Happy to go on.")


def politeness(profile: usp_env.Profile, dialogue: usp_env.Dialogue) -> float | None:
    """Share of the assistant's utterances that hold a polite word; None: there is nothing to score."""
    said = dialogue.utterances("assistant")
    return sum(any(word in text.lower() for word in POLITE) for text in said) / len(said) if said else None


def main() -> None:
    usp_env.register_reward("politeness", politeness)
    # Paid at the end; reward_mode="dense" pays it as it changes. "goal+0.1*politeness" adds it to another reward.
    for mode in ("terminal", "dense"):
        env = gym.make("usp_env/Assistant-v0", user="scripted", reward="politeness", max_turns=3, reward_mode=mode)
        _, info = env.reset(seed=7)
        rewards = []
        while info["end_reason"] is None:
            _, reward, _, _, info = env.step(REPLIES[info["turn"] - 1])
            rewards.append(round(float(reward), 3))
        print(f"{mode}: rewards {rewards}, sum {sum(rewards):.3f}, terms {info['reward_terms']}, ended by {info['end_reason']}")


if __name__ == "__main__":
    main()
