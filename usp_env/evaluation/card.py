"""The quality card: its shape, its metrics, and how it is written. No models, no statistics (`usp_env.evaluation.assemble`).

    card = read_card("runs/x/card.json")
    card["users"]["usp-mini"]["conversation"]["sem_sim"]["mean"]          65.4, in hundreds: shares and cosines are in 0-100
    card["users"]["usp-mini"]["conversation"]["human_likeness"]["twin"]   the same by a held-out scorer

Rows of `users` beside the simulated ones: `REAL`, the people themselves (similarities: one half of a person's turns against the
other), and `NEIGHBOUR` (similarities of a person and the one of `train` with the nearest objective facts). The card holds no
wall-clock time, so that the same generations give the same bytes; what a run cost is in `cost.json` beside it. A resumed run
makes no generation again, but conversations then share other batches, which may change what a model says in those that are left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from usp_env.errors import UspError
from usp_env.files import read_text, write_whole

REAL, NEIGHBOUR = "real", "real:neighbour"
CARD, MARKDOWN, COST = "card.json", "card.md", "cost.json"
Level = Literal["utterance", "conversation"]
LEVELS: tuple[Level, ...] = ("utterance", "conversation")


class Metric(NamedTuple):
    """What a metric is.

    Attributes:
        label: For tables.
        unit: Of the card's numbers.
        higher_is_better: None where neither is: read it beside the row of real people.
        scale: What natural units are multiplied by on the card.
    """

    label: str
    unit: str
    higher_is_better: bool | None
    scale: float

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    @property
    def heading(self) -> str:
        """Label and arrow."""
        return f"{self.label} {self.arrow}".strip()


METRICS: Mapping[str, Metric] = {
    "sem_sim": Metric("Sem-Sim", "cosine x 100", True, 100),
    "style_sim": Metric("Style-Sim", "cosine x 100", True, 100),
    "ava": Metric("AVA", "%", True, 100),
    "r_dp_p": Metric("r-DP.P", "%", True, 100),
    "r_dp_r": Metric("r-DP.R", "%", True, 100),
    "r_dpc": Metric("r-DPC", "%", True, 100),
    "dp_p": Metric("DP.P", "%", True, 100),
    "dp_r": Metric("DP.R", "%", True, 100),
    "dpc": Metric("DPC", "%", True, 100),
    "p_cover": Metric("P.Cover", "x 100", True, 100),
    "sc_score": Metric("SC.Score", "1 to 5", True, 1),
    "human_likeness": Metric("Human-likeness", "%", True, 100),
    "copy_rate": Metric("Copied from profile", "%", False, 100),
    "copy_rate_assistant": Metric("Copied from assistant", "%", False, 100),
    "role_drift": Metric("Role drift", "%", False, 100),
    "drift": Metric("Drift from profile", "points a turn", True, 100),
    "perplexity": Metric("Perplexity", "", False, 1),
    "termination_f1": Metric("Termination F1", "x 100", True, 100),
    "esr": Metric("ESR", "%", False, 100),
    "user_turns": Metric("User turns", "turns", None, 1),
    "ended_by_user": Metric("Ended by user", "%", None, 100),
    "turn_count_distance": Metric("Turn-count distance", "turns", False, 1),
    "adv": Metric("ADV", "plane units", False, 1),
    "first_turn_diversity": Metric("First-turn diversity", "x 100", True, 100),
    "ldl": Metric("LDL", "distance", None, 1),
    "uniformity": Metric("Uniformity", "log", None, 1),
    "collapse": Metric("Spread between people", "pseudo-F", True, 1),
    "mattr": Metric("MATTR", "x 100", None, 100),
    "hdd": Metric("HD-D", "x 100", None, 100),
    "yules_k": Metric("Yule's K", "", None, 1),
}
"""Every name that may stand on a card, in the order of its tables."""


class Entry(TypedDict):
    """One metric of one user at one level.

    Attributes:
        mean: Mean over people of their own means, in the metric's unit; None: not measured, see `reason`.
        ci95: 95 % interval over people and seeds; None where there is none (one person, or a fact about a whole set).
        n: People that counted; 0 where nothing was measured.
        scorer: The model or rule behind the number; None where nothing was measured.
        unit: See `Metric`; left out, like `higher_is_better`, where nothing was measured.
        higher_is_better: See `Metric`.
        reason: Why nothing was measured.
        note: What to know when reading it.
        detail: What belongs to some metrics alone: the ADV curve (`percentiles`, `curve`, `at_mark`), the curve of `drift`
            by turn (`turns`, `dialogues`), AVA's `threshold` and `sensitivity`, `precision` and `recall`, `alarm` and `p_value`.
            Similarities of the utterance level: how many `turns` were said, and where the user `ended` instead of saying one.
        twin: The same by the held-out scorer, without a twin of its own.
    """

    mean: float | None
    ci95: list[float] | None
    n: int
    scorer: str | None
    unit: NotRequired[str]
    higher_is_better: NotRequired[bool | None]
    reason: NotRequired[str]
    note: NotRequired[str]
    detail: NotRequired[dict[str, Any]]
    twin: NotRequired[Entry]


class Difference(TypedDict):
    """A user against another simulated user, a rival, in one metric, on the same people.

    A rival has values for at least 90 % of the user's people. At the utterance level the difference is over the turns that
    both said (termination F1 but all decisions), without those that have no context where one of the two is given no profile.
    At the conversation level such a user is given the person's first turn: both sides are then taken without their first turns
    (ESR and numbers of turns but from whole conversations), though only one side answered a real one.

    Attributes:
        against: The rival.
        difference: User less other, in the metric's unit.
        ci95: Of the difference; it excludes 0 where the two differ.
        ratio: Mean by mean, for margins as the paper gives them (1.34 is 34 % more); None where the divisor is 0,
            or one of the two is below 0. Of r-DPC, termination F1 and the turn-count distance: of the numbers themselves.
        n: People with a value on both sides.
        minimum_detectable_effect: The smallest true difference that so many people show with probability 0.8; None where
            nothing varied.
        twin: The same by the held-out scorer, against the same rival.
    """

    against: str
    difference: float | None
    ci95: list[float] | None
    ratio: float | None
    n: int
    minimum_detectable_effect: float | None
    twin: NotRequired[Difference]


class UserCard(TypedDict):
    """One row of the card.

    Attributes:
        spec: Resolved; `REAL` and `NEIGHBOUR` for the rows of real people.
        profile: Whether it was given one. Without one, its first turn in a conversation was the person's own.
        invalid: Level to outcome to how many generations or episodes gave nothing to measure.
        jobs: Level to how many generations or episodes there were to make.
        utterance: Metric to entry; empty where the level was not asked for.
        conversation: See `utterance`.
        differences: Level to metric to a difference for each rival, the hardest first: the one by whom the user stands worst.
            Empty for real people and where there is one user alone.
    """

    spec: str
    profile: bool
    invalid: dict[str, dict[str, int]]
    jobs: dict[str, int]
    utterance: dict[str, Entry]
    conversation: dict[str, Entry]
    differences: dict[str, dict[str, list[Difference]]]


class ReliabilityBin(TypedDict):
    """Texts of the people's real conversations whose P(human) lies between two edges; all but `n` in per cent.

    Attributes:
        low: Edge.
        high: Edge, not in the bin but for 100.
        n: Texts.
        predicted: Mean P(human).
        share: Of the texts that people wrote.
        ci95: Of the share; conversations, not texts, count as independent.
    """

    low: float
    high: float
    n: int
    predicted: float
    share: float
    ci95: list[float]


class Reliability(TypedDict):
    """Whether the human-likeness detector's probabilities come true on the evaluated people's real conversations.

    Each user turn (a person's) stands beside the first sentences of a reply in another of the conversations (an assistant's),
    nearly as long (within 20 %), as in the detector's training; a turn without such a partner is left out. Conversations that a
    detector was trained or scaled on flatter it (docs/models/human_likeness.md).

    Attributes:
        scorer: Name of the detector.
        n: Texts; half of them are people's.
        people: Whose conversations the texts are from.
        ece: Expected calibration error over ten equal bins of P(human), in per cent; few texts make it larger.
        bins: From the lowest; empty ones are left out.
    """

    scorer: str
    n: int
    people: int
    ece: float
    bins: list[ReliabilityBin]


class Map(TypedDict):
    """Where the evaluated people live on the map of their bank's split, as the split's fitted sampler lays it out.

    Attributes:
        layout: `umap` or `pca`.
        profiles: How many people the sampler was fitted on.
        held: Of each shade, the outermost first, per cent of them who live where the density is at least that of the shade.
        x: Left and right end of the shaded field, in the layout's units.
        y: Lower and upper end.
        shades: Rows of cells, the highest first, a digit a cell: 0 where nobody may be expected, k in the k-th of `held`.
        people: Id of each evaluated person to [x, y].
    """

    layout: str
    profiles: int
    held: list[int]
    x: list[float]
    y: list[float]
    shades: list[str]
    people: dict[str, list[float]]


class Card(TypedDict):
    """What `card.json` holds.

    Attributes:
        users: Simulated users by the spec they were asked for by, then `REAL` and `NEIGHBOUR`.
        bank: Its name.
        split: Of the bank.
        people: How many people of the split were evaluated, and their digest (`sha256`, of what they said too).
        assistant: Resolved spec of the response model.
        seeds: Of the generations.
        turns: Most user turns of a conversation.
        protocol: `ours` or `paper`.
        judge: Spec of the judge, or None.
        scorers: Part to name of the scorer and of its held-out twin, `{"human": ["human-v1", "human-v1-twin"]}`.
        versions: Of the packages.
        invalid: Outcome to how many, over all users and levels.
        calibration: Of the human-likeness detector and of its held-out twin; left out on older cards, and where no user turn
            finds a reply of its length in another conversation.
        map: Left out on older cards, and where the bank's split has no fitted sampler.
    """

    users: dict[str, UserCard]
    bank: str
    split: str
    people: dict[str, Any]
    assistant: str | None
    seeds: list[int]
    turns: int
    protocol: str
    judge: str | None
    scorers: dict[str, list[str | None]]
    versions: dict[str, str]
    invalid: dict[str, int]
    calibration: NotRequired[list[Reliability]]
    map: NotRequired[Map]


def not_measured(reason: str) -> Entry:
    """The entry that stands for no number.

    Example:
        >>> not_measured("no judge")
        {'mean': None, 'ci95': None, 'n': 0, 'scorer': None, 'reason': 'no judge'}
    """
    return {"mean": None, "ci95": None, "n": 0, "scorer": None, "reason": reason}


def read_card(path: str | Path) -> Card:
    """The card in a file, or in a run directory.

    Raises:
        UspError: There is none, or the file is damaged.
    """
    file = Path(path)
    file = file / CARD if file.is_dir() else file
    if not file.is_file():
        raise UspError(f"expected a quality card at {str(path)!r}, found none: usp-env evaluate --out {path} makes it")
    try:
        card: Card = json.loads(read_text(file, UspError))
        if not isinstance(card, dict) or not isinstance(card.get("users"), dict):
            raise ValueError("no 'users'")
    except ValueError as error:
        raise UspError(f"{file}: expected a quality card, it is damaged ({error})") from error
    return card


def write_card(path: Path, card: Card) -> None:
    """Write `card.json`; the same card gives the same bytes."""
    write_whole(path, json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
