"""The figures of the shipped auxiliary models, measured again: nothing is trained and nothing written but `--out`.

    python -m training.measure human style facts answers [--split test] [--cache FOLDER] [--out FILE.json]

The same kind of questions to the same weights as when they were trained (`docs/models/`). Figures differ a little where negatives
are drawn from a pool that has lost people since (those who pasted a held-out person's text).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import answer_verifier, human_likeness, style_encoder, verifiers
from training.auxiliary import Clock, people
from training.run_directory import check_folders
from usp_env.models import pairs
from usp_env.models.scorers import load, read_weights

Figures = dict[str, Any]


def human(split: str, cache: Path | None) -> Figures:
    """`human-v1` and its twin: macro-F1, AUC and calibration on whole conversations and on length-matched pairs."""
    every = human_likeness.EVERY
    found = human_likeness.examples(people(human_likeness.SEED)[split], every, every, human_likeness.SEED + 1)
    return {name: human_likeness.measure(load(name), found) for name in (human_likeness.NAME, f"{human_likeness.NAME}-twin")}


def style(split: str, cache: Path | None) -> Figures:
    """`style-v1` beside MiniLM, n-grams and function words: AUC of same-author pairs, with topic control and at random."""
    found = people(style_encoder.SEED)
    pool, others = found["other"][: style_encoder.POOL], found["other"][style_encoder.POOL :]
    rng = np.random.default_rng(style_encoder.SEED)
    texts, authors = style_encoder.chosen_turns([*found["train"], *others], style_encoder.MAX_TURNS, rng)
    fitted_on = style_encoder.Turns(texts, authors, np.zeros((0, 0)))  # the rivals' counts need no topics
    turns, tests = style_encoder.held_out(found[split], pool, cache)
    vectors = {style_encoder.NAME: load(style_encoder.NAME)(turns.texts), **style_encoder.baselines(fitted_on, turns)}
    return style_encoder.compare(vectors, tests)


def facts(split: str, cache: Path | None) -> Figures:
    """`facts-v1` and its twin beside plain MiniLM: AUC against each kind of false pair."""
    setting, read = verifiers.prepare(cache), verifiers.quick_reader()
    shipped, twin = (read_weights(name)[0] for name in ("facts-v1", "facts-v1-twin"))
    seed = verifiers.SEED + (3 if split == "test" else 2)
    figures = {}
    for head, (task, _) in verifiers.TASKS.items():
        questions = verifiers.featured(
            task(setting, setting.found[split], False, seed), read, shipped["idf"], cache, f"{head}-{split}"
        )
        figures[head] = verifiers.evaluate(head, shipped, twin, questions)
    return figures


def answers(split: str, cache: Path | None) -> Figures:
    """`answer-v1` and its twin on built cases: the right reply above an echo, a spammer and an essay."""
    setting = verifiers.prepare(cache)
    (main, meta), (twin, twin_meta) = read_weights("answer-v1"), read_weights("answer-v1-twin")
    readers = verifiers.quick_reader(), pairs.word_reader()
    builders = [answer_verifier.Builder(read, main["idf"]) for read in readers]
    made = [{"tensors": tensors, "raised": about["raised"]} for tensors, about in ((main, meta), (twin, twin_meta))]
    cases = answer_verifier.BUILT if split == "test" else None
    return answer_verifier.report(*builders, *made, answer_verifier.aligned(setting.found[split]), setting, cases)


MODELS: dict[str, Callable[[str, Path | None], Figures]] = {"human": human, "style": style, "facts": facts, "answers": answers}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--cache", type=Path, help="folder that keeps features between runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    check_folders(args.out)
    figures, clock = {}, Clock()
    for name in dict.fromkeys(args.models):
        figures[name] = MODELS[name](args.split, args.cache)
        print(json.dumps({name: figures[name]}, indent=1), f"after {clock()} s", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"split": args.split, **figures}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
