"""How alike two readings of one person are: profiles of a bank against other profiles of the same conversations.

    python -m training.agreement --split val --generator "runs/profile-generator/final-merged"
    python -m training.agreement --split test --generator profile-generator --second second_reading.jsonl --out agreement.json

Rows: a profile generator that reads the user's turns; the bank's `train` profile whose person's turns are nearest (mean of the
turns' embeddings); another person of the split; and, with `--second FILE`, an independent second reading, the ceiling of every
metric on profiles. Columns: mean cosine of the objective paragraphs and of the subjective ones, 95 % percentile bootstrap over
people; below a generator, how far it stands above the nearest profile, person by person. An output that is not two paragraphs
has cosine 0. `--second` adds Cohen's kappa of each Big Five trait.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.conversations import of_split
from training.perplexity import strangers
from training.run_directory import check_folders
from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError
from usp_env.extraction.generator import ProfileTexts, load_generator
from usp_env.models import embedders
from usp_env.profiles import Profile, ProfileBank

TRAITS = ("conscientiousness", "agreeableness", "extraversion", "openness", "neuroticism")
FloatArray = npt.NDArray[np.float64]


class Likeness(NamedTuple):
    """Cosines of n people: objective (n,) and subjective (n,) paragraphs; 0 where there is no profile."""

    objective: FloatArray
    subjective: FloatArray


def likeness(embed: embedders.Embedder, people: Sequence[Profile], read: Sequence[ProfileTexts | None]) -> Likeness:
    """Cosines between people's profiles and what was read, person by person."""
    cosines = []
    for part in ("objective", "subjective"):
        given = embed([getattr(person, part) for person in people])
        found = embed([getattr(texts, part) if texts else "-" for texts in read])
        cosines.append((given * found).sum(1).astype(float) * np.array([texts is not None for texts in read]))
    return Likeness(*cosines)


def interval(values: FloatArray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean, clustered by nothing: one value a person."""
    means = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def texts_of(profile: Profile) -> ProfileTexts:
    """The two paragraphs of a bank's profile."""
    return ProfileTexts(profile.objective, profile.subjective)


def voices(embed: embedders.Embedder, dialogues: Sequence[Dialogue]) -> FloatArray:
    """(n, d) unit vectors: the mean embedding of each person's turns."""
    turns = [dialogue.utterances("user") for dialogue in dialogues]
    vectors = embed([turn for its in turns for turn in its])
    ends = np.cumsum([len(its) for its in turns])
    means = np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])]).astype(float)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def nearest(embed: embedders.Embedder, bank: str, dialogues: Sequence[Dialogue]) -> list[ProfileTexts]:
    """For each conversation the `train` profile whose person's turns are nearest."""
    known = of_split(bank, "train")
    similar = voices(embed, dialogues) @ voices(embed, [dialogue for _, dialogue in known]).T
    return [texts_of(known[k][0]) for k in similar.argmax(1)]


def generated(spec: str, dialogues: Sequence[Dialogue], batch: int = 16) -> list[ProfileTexts | None]:
    """What a profile generator reads; None where it wrote no two paragraphs.

    Raises:
        BackendError: The engine failed.
    """
    generator = load_generator(spec)
    read: list[ProfileTexts | None] = []
    for start in range(0, len(dialogues), batch):
        for result in generator.generate(dialogues[start : start + batch]):
            if isinstance(result, BackendError):
                raise result
            read.append(result)
    return read


def kappas(people: Sequence[Profile], others: Sequence[Profile]) -> dict[str, float]:
    """Cohen's kappa of each Big Five trait (high, low, inconclusive) between two readings of the same people."""
    from sklearn.metrics import cohen_kappa_score

    def marks(profiles: Sequence[Profile], trait: str) -> list[str]:
        return [(p.attributes or {})["subjective_characteristics"]["big_five"][trait] for p in profiles]

    return {trait: float(cohen_kappa_score(marks(people, trait), marks(others, trait))) for trait in TRAITS}


def row(name: str, cosines: Likeness) -> dict[str, Any]:
    """One line of the table; printed, too."""
    record: dict[str, Any] = {"n": len(cosines.objective)}
    for part, values in cosines._asdict().items():
        record[part] = {"mean": float(values.mean()), "ci95": interval(values)}
    shown = "   ".join(
        f"{part[:2].upper()} {r['mean']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}]" for part, r in list(record.items())[1:]
    )
    print(f"{name:24} n={record['n']:4}   {shown}", flush=True)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; `--out` keeps it as JSON."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--generator", action="append", default=[], help="a spec; give it again for more")
    made.add_argument("--bank", default="sharegpt")
    made.add_argument("--split", default="val", help="test only for the figures of a released weight")
    made.add_argument("--n", type=int, help="people; default: all of the split")
    made.add_argument("--second", help="a bank of second readings, by the same ids")
    made.add_argument("--embedder", default="minilm")
    made.add_argument("--save", type=Path, help="JSONL of what the generators wrote, to be read by a person")
    made.add_argument("--out", type=Path)
    args = made.parse_args(argv)
    check_folders(args.out, args.save)
    embed = embedders.load(args.embedder)
    pairs = of_split(args.bank, args.split)[: args.n]
    people, dialogues = [profile for profile, _ in pairs], [dialogue for _, dialogue in pairs]

    readings = {
        "nearest train profile": nearest(embed, args.bank, dialogues),
        "another person": [texts_of(people[k]) for k in strangers(len(people))],
    } | {spec: generated(spec, dialogues) for spec in args.generator}
    found = {name: likeness(embed, people, read) for name, read in readings.items()}
    table = {name: row(name, cosines) for name, cosines in found.items()}
    for spec in args.generator:
        above = Likeness(*(own - other for own, other in zip(found[spec], found["nearest train profile"], strict=True)))
        table[f"{spec} - nearest"] = row("  above the nearest", above)
        table[spec]["two_paragraphs"] = float(np.mean([read is not None for read in readings[spec]]))
        print(f"{spec}: two paragraphs in {table[spec]['two_paragraphs']:.3f}")
    if args.second:
        other = ProfileBank.load(args.second)
        both = [person for person in people if person.id in other]
        again = [other.get(person.id) for person in both]
        name = "second reading"
        table[name] = row(name, likeness(embed, both, [texts_of(profile) for profile in again]))
        table[name]["kappa"] = kappas(both, again)
        print("kappa", {trait: round(value, 2) for trait, value in table[name]["kappa"].items()})
    if args.save:
        shown = ({"id": p.id} | {spec: readings[spec][i] for spec in args.generator} for i, p in enumerate(people))
        args.save.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in shown), "utf-8")
    if args.out:
        args.out.write_text(json.dumps({"split": args.split, "embedder": embed.name, "rows": table}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
