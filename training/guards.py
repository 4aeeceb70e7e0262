"""What a policy may do to its reward instead of speaking like its person: measured in every rollout.

Rewards that a model gives can be had by other means: reciting the profile (copy rate), repeating what scored (early stops, first
turns that are all alike), talking at length or hardly at all, or talking like the assistant. None of these is in the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from usp_env.episode import Episode
from usp_env.evaluation.scorers import Scorers
from usp_env.metrics import authenticity, consistency, continuity, diversity
from usp_env.metrics.consistency import DialogueTurns, ProfileText

Array = np.ndarray


def guards(episodes: Sequence[Episode], scorers: Scorers) -> dict[str, float]:
    """Means over dialogues; NaN where nobody said anything.

    Args:
        episodes: That were scored.
        scorers: `human` is asked; its twin is in no reward.
    """
    turns = [DialogueTurns.of(episode.dialogue()) for episode in episodes]
    profiles = [ProfileText.of(episode.profile) for episode in episodes]
    texts = [[turn for turn in own.turns if turn.strip()] for own in turns]
    firsts = [own[0] for own in texts if own]
    said = [m for episode in episodes for m in episode.messages if m.role == "user" and m.token_ids is not None]
    twin = scorers.human.twin or scorers.human.model
    return {
        "turns": mean([len(own) for own in texts]),
        "words": mean([len(turn.split()) for own in texts for turn in own]),
        "cut_off": mean([m.finish_reason == "length" for m in said]),
        "ended_by_user": mean([episode.end_reason == "user_ended" for episode in episodes]),
        "early_stopped": mean(continuity.early_stopped(turns)) if turns else float("nan"),
        "copy_rate": mean(continuity.copied_from_profile(turns, profiles)) if turns else float("nan"),
        "role_drift": mean(continuity.role_drift(turns, scorers.human.model)) if turns else float("nan"),
        "human_twin": mean(authenticity.human_likeness(texts, twin)) if texts else float("nan"),
        "first_turn_diversity": mean(diversity.first_turn_diversity(firsts)) if len(firsts) > 1 else float("nan"),
    }


def consistencies(episodes: Sequence[Episode], scorers: Scorers) -> dict[str, Array]:
    """r-DP.P, r-DP.R and r-DPC of each dialogue (paper §4.1.3) by the reward side's verifier and by its twin, each (n,)."""
    turns = [DialogueTurns.of(episode.dialogue()) for episode in episodes]
    profiles = [ProfileText.of(episode.profile) for episode in episodes]
    found: dict[str, Array] = {}
    for suffix, (verifier, _) in zip(("", "_twin"), scorers.facts.both(), strict=False):
        precision = consistency.r_dp_p(profiles, turns, verifier)
        recall = consistency.r_dp_r(turns, profiles, verifier)
        found |= {f"r_dp_p{suffix}": precision, f"r_dp_r{suffix}": recall}
        found[f"r_dpc{suffix}"] = consistency.harmonic_mean(precision, recall)
    return found


def reward_terms(episodes: Sequence[Episode], weights: Mapping[str, float]) -> dict[str, float]:
    """Mean reward and mean of each of its terms, their weights in the reward taken out again."""
    names = dict.fromkeys(name for episode in episodes for name in episode.reward_terms)
    terms = {
        name: mean([e.reward_terms[name] / weights.get(name, 1.0) for e in episodes if name in e.reward_terms]) for name in names
    }
    rewards = [sum(episode.rewards) for episode in episodes]
    spread = float(np.std(rewards)) if rewards else float("nan")
    return {"reward": mean(rewards), "reward_std": spread, **terms}


def mean(values: Sequence[float] | Array) -> float:
    """Of what is known; NaN where nothing is."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")
