"""What a set of conversations is like beside the real ones: lengths and ends, words, spread, ADV."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from usp_env.dialogue import Dialogue
from usp_env.errors import MissingExtraError, SpecError
from usp_env.evaluation.columns import Column, FloatArray, Measured, Missing, Whole
from usp_env.evaluation.people import Person
from usp_env.evaluation.resampling import GROUPS, jackknife, people_interval
from usp_env.evaluation.said import none_for_nan
from usp_env.evaluation.scorers import Scorers
from usp_env.metrics import authenticity, continuity, diversity, lexical
from usp_env.metrics.authenticity import MARK, PERCENTILES
from usp_env.metrics.consistency import DialogueTurns

GIVEN = "its first turn is given"


def length(
    talks: Sequence[DialogueTurns], end_reasons: Sequence[str | None], people: Sequence[Person], turns: int
) -> dict[str, Measured]:
    """ESR and what stands beside it: it could be had for nothing by ending early.

    Args:
        talks: All user turns of each conversation, a given first one counted, (m,); none where the episode is not valid.
        end_reasons: None where the episode is not valid, (m,).
        people: Whom the user played, (m,).
        turns: Most user turns of a conversation; longer real ones count as this.
    """
    valid = np.array([reason is not None for reason in end_reasons], bool)
    counts = np.where(valid, continuity.user_turns(talks), np.nan)
    ended = np.full(len(talks), np.nan)
    ended[valid] = continuity.ended_by_user([reason for reason in end_reasons if reason is not None])
    known = np.array([who.ended for who in people], bool) & valid
    real = np.array([min(len(who.turns), turns) for who in people], np.float64)
    return {
        "esr": Column(continuity.early_stopped(talks), "endings"),
        "user_turns": Column(counts, "count"),
        "ended_by_user": Column(ended, "end token"),
        "turn_count_distance": turn_counts(counts, real, known, turns),
    }


def turn_counts(simulated: FloatArray, real: FloatArray, known: npt.NDArray[np.bool_], turns: int) -> Measured:
    """Wasserstein-1 distance of the turn counts, over people whose real end is known; a row's value is its own gap."""
    counted = known & ~np.isnan(simulated)
    if not counted.any():
        return Missing("no valid conversation of a person whose end is known")
    parts = (np.where(counted, simulated, np.nan), np.where(counted, real, np.nan))
    detail = {"simulated_mean": none_for_nan(np.nanmean(parts[0])), "real_mean": none_for_nan(np.nanmean(parts[1]))}
    note = (
        f"people whose end is known; real counts capped at {turns}, as the simulated are; a distance is never below 0 and a "
        "resampled one is biased upward: a lower bound above 0 is no evidence of a difference"
    )
    return Column(np.abs(parts[0] - parts[1]), "Wasserstein-1", "distance", parts, note=note, detail=detail)


def words(own: Sequence[DialogueTurns]) -> dict[str, Measured]:
    """Lexical diversity of each conversation; short ones have none."""
    turns = [dialogue.turns for dialogue in own]
    return {
        "mattr": Column(
            lexical.mattr(turns), f"window {lexical.WINDOW}", note=f"conversations of {lexical.WINDOW} words and more"
        ),
        "hdd": Column(lexical.hdd(turns), f"sample {lexical.SAMPLE}", note=f"conversations of {lexical.SAMPLE} words and more"),
        "yules_k": Column(lexical.yules_k(turns), "words"),
    }


def population(
    texts: Sequence[str], firsts: Sequence[str], people: Sequence[str], seeds: Sequence[int], given: bool, scorers: Scorers
) -> dict[str, Measured]:
    """How different the simulated people are from one another.

    Args:
        texts: All own turns of each conversation, joined, (m,); blank where the episode is not valid.
        firsts: First turn of each, (m,); blank likewise.
        people: Whom the user played, (m,).
        seeds: Under which seed, (m,).
        given: Whether the user found its own first turn.
        scorers: `embed` is asked.
    """
    spoken = [k for k, text in enumerate(texts) if text.strip()]
    one_each = [k for k in spoken if seeds[k] == min(seeds)]
    vectors = np.zeros((len(texts), 1))
    if spoken:
        found = np.asarray(scorers.embed.model([texts[k] for k in spoken]), np.float64)
        vectors = np.zeros((len(texts), found.shape[1]))
        vectors[spoken] = found
    return {
        "first_turn_diversity": _first_turns(firsts, seeds) if given else Missing(GIVEN),
        **_density(vectors[one_each], scorers.embed.name),
        "collapse": _collapse(vectors[spoken], [people[k] for k in spoken], len(set(seeds)), scorers.embed.name),
    }


def _first_turns(firsts: Sequence[str], seeds: Sequence[int]) -> Measured:
    """The mean over pairs within a seed. A turn is in as many pairs as there are others, so rows are not independent.

    The interval is that of the jackknife's pseudo-values n U - (n - 1) U_(-i). With U the mean over pairs and v_i that over the
    pairs of row i, the mean without it is U_(-i) = (n U - 2 v_i) / (n - 2): no pair is looked at again.
    """
    values, pseudo = np.full(len(firsts), np.nan), np.full(len(firsts), np.nan)
    for seed in sorted(set(seeds)):
        rows = np.flatnonzero(np.array(seeds) == seed)
        found = diversity.first_turn_diversity([firsts[k] for k in rows])
        n = np.count_nonzero(~np.isnan(found))
        if n > 2:
            mean = np.nanmean(found)
            values[rows], pseudo[rows] = found, n * mean - (n - 1) * (n * mean - 2 * found) / (n - 2)
    if np.isnan(values).all():
        return Missing("fewer than 3 first turns")
    return Column(values, "unigrams", "pairs", (pseudo,), note="mean over pairs; interval by jackknife")


def _density(vectors: FloatArray, scorer: str) -> dict[str, Measured]:
    if len(vectors) < 4:
        return {name: Missing(f"{len(vectors)} conversations are too few") for name in ("ldl", "uniformity")}
    note = "of the set; interval by jackknife, normal approximation"
    n = len(vectors)
    k = min(50, n - math.ceil(n / GROUPS) - 1)  # the same when a group is left out
    found: list[tuple[str, Callable[[FloatArray], float], dict[str, int]]] = [
        ("ldl", lambda x: diversity.ldl(x, k).value, {"k": k}),
        ("uniformity", diversity.uniformity, {}),
    ]
    out: dict[str, Measured] = {}
    for name, statistic, detail in found:
        interval = jackknife(vectors, statistic)
        out[name] = Whole(interval.value, interval.low, interval.high, interval.n, scorer, note, detail)
    return out


def _collapse(vectors: FloatArray, people: Sequence[str], seeds: int, scorer: str) -> Measured:
    """The collapse alarm: variance between people against variance within them."""
    if seeds < 2:
        return Missing("one seed: conversations of one person are to be compared; use --seeds 2 or more")
    try:
        spread = diversity.spread(vectors, people)
    except SpecError as error:
        return Missing(str(error))
    detail = {"alarm": spread.alarm, "p_value": none_for_nan(spread.p_value), "ratio": _finite(spread.ratio)}
    if np.isnan(spread.f):
        return Whole(0.0, np.nan, np.nan, len(set(people)), scorer, "nothing varies: every conversation is the same", detail)
    if not np.isfinite(spread.f):
        return Missing("people never vary between seeds: the generations are the same")
    return Whole(spread.f, np.nan, np.nan, len(set(people)), scorer, "tested by permutation, see p_value", detail)


def _finite(value: float) -> float | None:
    return none_for_nan(value) if np.isfinite(value) else None


def adv(
    pairs: Mapping[str, tuple[Sequence[Dialogue], Sequence[Dialogue]]],
    people: Mapping[str, Sequence[str]],
    reference: Sequence[Dialogue],
    scorers: Scorers,
    paper: bool,
) -> dict[str, Measured]:
    """ADV of every user.

    Args:
        pairs: User to (real, generated) dialogues; with `paper` the real ones are the same for all.
        people: User to whose they are.
        reference: Real dialogues of the whole split: the plane is fitted on them; not with `paper`.
        scorers: `embed` is asked.
        paper: See `usp_env.metrics.authenticity.adv`.
    """
    embed = scorers.embed.model
    try:
        if paper:
            real = next(iter(pairs.values()))[0]
            found = authenticity.adv(real, {user: own for user, (_, own) in pairs.items()}, embed, protocol="paper")
        else:
            found = {
                user: authenticity.adv(real, {user: own}, embed, reference=reference)[user] for user, (real, own) in pairs.items()
            }
    except (SpecError, MissingExtraError) as error:
        return dict.fromkeys(pairs, Missing(str(error)))
    return {user: _adv_column(distances, people[user], scorers.embed.name) for user, distances in found.items()}


def _adv_column(distances: FloatArray, people: Sequence[str], scorer: str) -> Column:
    rows = np.flatnonzero(~np.isnan(distances))
    detail: dict[str, object] = {"mark": MARK, "at_mark": None, "percentiles": list(PERCENTILES)}
    if len(rows):
        at_mark = people_interval([people[i] for i in rows], lambda drawn: authenticity.at_mark(distances[rows[drawn]]))
        detail |= {
            "at_mark": none_for_nan(at_mark.value),
            "at_mark_ci95": None if np.isnan(at_mark.low) else [none_for_nan(at_mark.low), none_for_nan(at_mark.high)],
            "curve": [none_for_nan(value) for value in authenticity.percentile_curve(distances)],
        }
    return Column(distances, scorer, detail=detail, note=f"mean distance; at_mark is the distance at the {MARK}th percentile")
