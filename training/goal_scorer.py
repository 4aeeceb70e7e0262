"""Calibrate the provisional scorer of the reward `goal` on real conversations, and measure what it can tell apart.

    python -m training.goal_scorer           # about 2 minutes on 2 cores; needs `usp-env fetch minilm sharegpt`
    python -m training.goal_scorer --show 10 # fits nothing: prints 10 conversations with their scores, to be read

Writes `usp_env/models/goal-minilm-v0.json`. Its figures are those of `usp_env/models/GOAL_SCORER.md`. Constants come from the
first `--conversations` (by id) of the bank's `train` split, figures from all of `val`; reserved conversations are in neither.
Used are the conversations whose profile has one detail for each user turn, in order: there, detail i is what turn i asks for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import usp_env.models
from training.conversations import of_split
from usp_env.dialogue import Dialogue, Message
from usp_env.models import embedders
from usp_env.profiles import Profile
from usp_env.rewards.goal import (
    MAX_OVERLAP,
    MAX_SENTENCES,
    Calibration,
    GoalProgress,
    SimilarityScorer,
    candidates,
    overlap,
    sentences,
)

NAME = "minilm-v0"
OUT = Path(usp_env.models.__file__).parent / f"goal-{NAME}.json"
RAISED_GRID = np.round(np.arange(0.30, 0.81, 0.05), 2)
STOCK_REPLY = "Sure, I can help you with that! Let me know if you have any other questions."
Cosine = Callable[[Sequence[str], Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Case:
    """A real conversation and who had it; detail i is what the user's turn i asks for."""

    profile: Profile
    dialogue: Dialogue

    @property
    def turns(self) -> list[str]:
        """The user's utterances."""
        return self.dialogue.utterances("user")

    def answers(self, i: int, said: Sequence[str] | None = None) -> tuple[str, ...]:
        """The sentences of reply i that may count for a user who has said `said` (default: this one)."""
        replies = self.dialogue.utterances("assistant")
        return candidates(replies[i], tuple(self.turns[: i + 1] if said is None else said)) if i < len(replies) else ()


def aligned_cases(pairs: Sequence[tuple[Profile, Dialogue]]) -> list[Case]:
    """The cases with one detail for each user turn."""
    cases = [Case(profile, dialogue) for profile, dialogue in pairs]
    return [case for case in cases if len(case.profile.task_details) == case.dialogue.turns]


def best_cosine(cosine: Cosine, pairs: Sequence[tuple[Sequence[str], str]]) -> np.ndarray:
    """The largest cosine of a request with any of its sentences, shape (n,); −1 where there is no sentence."""
    flat = [(sentence, request) for group, request in pairs for sentence in group]
    values = cosine([s for s, _ in flat], [r for _, r in flat])
    ends = np.cumsum([len(group) for group, _ in pairs])
    return np.array([max(values[end - len(group) : end], default=-1.0) for end, (group, _) in zip(ends, pairs, strict=True)])


def pair_kinds(cases: Sequence[Case], of_turn: bool = False) -> dict[str, list[tuple[Sequence[str], str]]]:
    """Kinds of (sentences, request); the request is the detail, or with `of_turn` the user's own turn that makes it."""
    rng = np.random.default_rng(0)
    kinds: dict[str, list[tuple[Sequence[str], str]]] = {}
    for n, case in enumerate(cases):
        for i, (detail, turn) in enumerate(zip(case.profile.task_details, case.turns, strict=True)):
            stranger = cases[(n + int(rng.integers(1, len(cases)))) % len(cases)]
            said, replies = case.turns[: i + 1], len(stranger.dialogue.utterances("assistant"))
            kind = {
                "answered": case.answers(i),
                "another reply of the conversation": case.answers(_other(rng, i, len(case.turns))),
                "unrelated reply": stranger.answers(int(rng.integers(replies)), said),
                "unrelated conversation": [s for j in range(replies) for s in stranger.answers(j, said)],
                "echo, unfiltered": sentences(turn)[:MAX_SENTENCES],
                "echo": candidates(turn, tuple(said)),
            }
            if of_turn:  # the detail is the turn in other words, as a reader put them
                kind["echo in other words"] = candidates(detail, tuple(said))
            if kind["answered"]:
                for name, group in kind.items():
                    kinds.setdefault(name, []).append((group, turn if of_turn else detail))
    return kinds


def _other(rng: np.random.Generator, i: int, n: int) -> int:
    return (i + int(rng.integers(1, n))) % n


def raising(cosine: Cosine, cases: Sequence[Case], threshold: float) -> dict[str, float]:
    """Shares of details first recognised in the turn that asks for them, earlier, later, never; and in a stranger's turns."""
    rng, counts = np.random.default_rng(0), dict.fromkeys(("right", "early", "late", "never", "stranger"), 0)
    total = sum(len(case.turns) for case in cases)
    for n, case in enumerate(cases):
        stranger = cases[(n + int(rng.integers(1, len(cases)))) % len(cases)]
        for i, detail in enumerate(case.profile.task_details):
            hits = np.flatnonzero(cosine(case.turns, [detail] * len(case.turns)) >= threshold)
            first = hits[0] if len(hits) else None
            name = "never" if first is None else "right" if first == i else "early" if first < i else "late"
            counts[name] += 1
            counts["stranger"] += bool(np.any(cosine(stranger.turns, [detail] * len(stranger.turns)) >= threshold))
    return {name: round(count / total, 3) for name, count in counts.items()}


def fit(cosine: Cosine, cases: Sequence[Case]) -> Calibration:
    """The constants.

    zero: what 95 % of unrelated *conversations* stay below, since c_i is a maximum over all replies. one: the median answer;
    more similarity than that is a sign of repetition. raised: the lowest threshold within .02 of the best share of details
    recognised in the right turn, since simulated users' words lie further from the details than those of the real ones.
    """
    kinds = pair_kinds(cases)
    zero = np.quantile(best_cosine(cosine, kinds["unrelated conversation"]), 0.95)
    one = np.median(best_cosine(cosine, kinds["answered"]))
    right = np.array([raising(cosine, cases, threshold)["right"] for threshold in RAISED_GRID])
    raised = RAISED_GRID[np.flatnonzero(right >= right.max() - 0.02)[0]]
    return Calibration(round(float(zero), 3), round(float(one), 3), float(raised))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive exceeds a negative, ties counted half."""
    difference = positive[:, None] - negative[None, :]
    return round(float(np.mean(difference > 0) + np.mean(difference == 0) / 2), 3)


def measure(scorer: SimilarityScorer, cases: Sequence[Case]) -> dict[str, Any]:
    """What the scorer can and cannot tell apart."""
    figures: dict[str, Any] = {"conversations": len(cases), "details": sum(len(case.turns) for case in cases)}
    for request, of_turn in (("detail", False), ("user turn", True)):
        best = {name: best_cosine(scorer.cosine, pairs) for name, pairs in pair_kinds(cases, of_turn).items()}
        figures[f"request: {request}"] = {name: _summary(scorer.calibration, values) for name, values in best.items()}
        rivals = ("unrelated reply", "another reply of the conversation")
        figures[f"auc: {request}"] = {name: auc(best["answered"], best[name]) for name in rivals}
    figures["raised"] = {str(t): raising(scorer.cosine, cases, float(t)) for t in RAISED_GRID}
    kept = [overlap(s, case.turns[: i + 1]) <= MAX_OVERLAP for case, i, reply in _replies(cases) for s in sentences(reply)]
    figures["reply sentences taken for copies"] = round(1 - float(np.mean(kept)), 4)
    figures["phi"] = whole_conversations(scorer, cases)
    return figures


def _summary(calibration: Calibration, cosines: np.ndarray) -> dict[str, Any]:
    p = calibration.probability(cosines)
    quantiles = [round(float(q), 3) for q in np.quantile(cosines, (0.05, 0.25, 0.5, 0.75, 0.95))]
    shares = {"p=0": np.mean(p == 0), "p>=.5": np.mean(p >= 0.5), "p=1": np.mean(p == 1), "mean p": np.mean(p)}
    silent = {"no sentence left": np.mean(cosines == -1)}
    return {"n": len(p), "cosine 5/25/50/75/95 %": quantiles} | {k: round(float(v), 3) for k, v in (shares | silent).items()}


def _replies(cases: Sequence[Case]) -> list[tuple[Case, int, str]]:
    return [(case, i, reply) for case in cases for i, reply in enumerate(case.dialogue.utterances("assistant"))]


def whole_conversations(scorer: SimilarityScorer, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Mean and quartiles of Φ at the end, the real users' turns answered by different assistants."""
    replies = [case.dialogue.utterances("assistant") for case in cases]
    shifted = [[reply for _, _, reply in _replies([*cases[n + 1 :], *cases[:n]])] for n in range(len(cases))]
    assistants: dict[str, Callable[[int, int, str], str | None]] = {
        "the real one": lambda n, i, turn: replies[n][i] if i < len(replies[n]) else None,
        "its first sentences alone": lambda n, i, turn: next(iter(cases[n].answers(i)), None),
        "its replies, each a turn early": lambda n, i, turn: replies[n][(i + 1) % len(replies[n])],
        "another conversation's": lambda n, i, turn: shifted[n][i],
        "echo": lambda n, i, turn: turn,
        "the detail itself": lambda n, i, turn: cases[n].profile.task_details[i],
        "a stock reply": lambda n, i, turn: STOCK_REPLY,
    }
    return {name: _phi(scorer, cases, reply) for name, reply in assistants.items()}


def _phi(scorer: SimilarityScorer, cases: Sequence[Case], reply: Callable[[int, int, str], str | None]) -> dict[str, float]:
    dialogues = []
    for n, case in enumerate(cases):
        said = [(turn, reply(n, i, turn)) for i, turn in enumerate(case.turns)]
        messages = [m for turn, answer in said for m in (Message("user", turn), answer and Message("assistant", answer)) if m]
        dialogues.append(Dialogue(tuple(messages)))
    terms = GoalProgress(scorer)([case.profile for case in cases], dialogues)
    values = np.array([t.value for t in terms if t is not None])
    names = ("mean", "25 %", "50 %", "75 %")
    return dict(zip(names, (round(float(v), 3) for v in (values.mean(), *np.quantile(values, (0.25, 0.5, 0.75)))), strict=True))


def show(scorer: SimilarityScorer, cases: Sequence[Case]) -> None:
    """Print conversations with their scores, to be read."""
    for case in cases:
        print(f"\n━━ {case.profile.id}")
        for i, (detail, turn) in enumerate(zip(case.profile.task_details, case.turns, strict=True)):
            hits = np.flatnonzero(scorer.raised(case.turns, [detail] * len(case.turns)))
            group = case.answers(i)
            p = scorer(group, [detail] * len(group))
            print(f"{i}. {detail}\n   user: {turn[:150]!r}   raised at {hits[0] if len(hits) else None}")
            for k in np.argsort(-p)[:2]:
                print(f"   p {p[k]:.2f} {group[k][:170]!r}")
        terms = GoalProgress(scorer)([case.profile], [case.dialogue])[0]
        print(f"Φ {terms.value:.2f}" if terms else "Φ none")


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=250, help="of the train split, for the constants")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="fit nothing; print N conversations of val with scores")
    args = parser.parse_args()

    scorer = SimilarityScorer(NAME, embedders.load("minilm"), Calibration(0.0, 1.0, 1.0), cache_size=100_000)
    held_out = aligned_cases(of_split("sharegpt", "val"))
    if args.show:
        scorer.calibration = Calibration.load(NAME)
        return show(scorer, held_out[: args.show])
    fitted_on = aligned_cases(of_split("sharegpt", "train")[: args.conversations])
    scorer.calibration = calibration = fit(scorer.cosine, fitted_on)
    record = {
        "name": NAME,
        "embedder": "minilm",
        **asdict(calibration),
        "fitted_on": {"bank": "sharegpt", "split": "train", "conversations": len(fitted_on)},
        "measured_on": {"bank": "sharegpt", "split": "val", **measure(scorer, held_out)},
    }
    OUT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(OUT.read_text("utf-8"))


if __name__ == "__main__":
    main()
