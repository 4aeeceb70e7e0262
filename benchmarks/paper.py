"""What Wang et al. (ACL 2025) print, for a place beside our own figures. Theirs: LMSYS-Chat-1M, Llama-3-8B, judge GPT-4o."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER = "Wang et al., ACL 2025"

UTTERANCE_METRICS = ("sem_sim", "style_sim", "ava", "r_dp_p", "p_cover", "sc_score")
UTTERANCE: Mapping[str, tuple[float | None, ...]] = {
    "DialogueGPT(4o)": (40.24, 13.75, 11.28, None, None, None),
    "PlatoLM": (39.37, 43.11, 40.29, None, None, None),
    "Character_LLM": (37.54, 18.88, 15.03, 54.77, 66.62, 2.43),
    "Character_GLM": (38.51, 22.28, 18.17, 68.72, 57.72, 2.95),
    "ProfileGPT(llama)": (39.82, 14.88, 13.47, 82.19, 72.29, 3.92),
    "ProfileGPT(4o)": (41.66, 5.74, 9.87, 92.73, 73.34, 4.71),
    "USP w/o RLCC": (54.25, 46.57, 43.61, 71.30, 71.56, 3.36),
    "USP": (53.38, 46.60, 43.35, 72.61, 71.23, 3.39),
}
"""Table 3."""

CONVERSATION_METRICS = ("esr", "sem_sim", "style_sim", "ava", "r_dp_p", "r_dp_r", "r_dpc", "p_cover", "sc_score")
CONVERSATION: Mapping[str, tuple[float | None, ...]] = {
    "DialogueGPT(4o)": (35, 48.91, 14.21, 10.58, None, None, None, None, None),
    "PlatoLM": (18, 43.24, 32.43, 31.60, None, None, None, None, None),
    "Character_LLM": (52, 23.37, 7.13, 4.69, 25.48, 6.43, 10.27, 21.49, 2.82),
    "Character_GLM": (44, 40.19, 10.86, 12.67, 39.51, 29.61, 33.85, 42.75, 3.64),
    "ProfileGPT(llama)": (31, 46.84, 10.58, 11.63, 67.09, 29.98, 41.44, 47.72, 4.19),
    "ProfileGPT(4o)": (32, 48.87, 10.15, 11.26, 76.59, 43.72, 55.66, 51.02, 4.56),
    "USP w/o RLCC": (12, 66.17, 40.01, 35.68, 53.17, 71.88, 61.13, 42.63, 3.24),
    "USP": (10, 65.39, 46.23, 38.77, 56.24, 74.38, 64.05, 44.08, 3.35),
}
"""Table 4; the partner is GPT-4o."""

CLAIMS = {"adv": "the smallest at every percentile"}
"""Of what is drawn and not printed (Figure 3)."""

POPULATIONS = ("majority", "minority", "virtual", "average")
ASSISTANTS: Mapping[str, tuple[float, ...]] = {
    "Deepseek-v3": (8.25, 6.13, 7.70, 7.36),
    "GPT-4o": (7.86, 6.65, 7.19, 7.23),
    "Claude-Sonnet": (7.18, 6.61, 7.48, 7.09),
    "4o-Mini": (6.84, 5.70, 5.52, 6.02),
    "Claude-Haiku": (4.88, 5.42, 5.43, 5.24),
}
"""Table 7: 1 to 10 by GPT-4o, 100 profiles of each population."""


def margin(metric: str, higher_is_better: bool = True) -> tuple[str, float]:
    """The best baseline of the conversation level and the ratio of USP's figure to its.

    Example:
        >>> margin("sem_sim")
        ('DialogueGPT(4o)', 1.337)
        >>> margin("esr", higher_is_better=False)
        ('PlatoLM', 0.556)
    """
    column = CONVERSATION_METRICS.index(metric)
    found: dict[str, Any] = {
        name: row[column] for name, row in CONVERSATION.items() if not name.startswith("USP") and row[column] is not None
    }
    best = (max if higher_is_better else min)(found, key=lambda name: found[name])
    ours = CONVERSATION["USP"][column]
    assert ours is not None
    return best, round(ours / found[best], 3)
