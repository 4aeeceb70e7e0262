"""`usp-env evaluate`: simulated users side by side, on the people of a split."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from usp_env.console import at_least, say
from usp_env.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    from usp_env.backends.base import Backend
    from usp_env.backends.spec import ModelSpec
    from usp_env.evaluation.card import Level
    from usp_env.evaluation.plan import Plan
    from usp_env.metrics.judges import Judge

USERS_WITHOUT_PROFILE = ("plato", "dialogue")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `usp-env evaluate`."""
    parser.add_argument("--user", action="append", required=True, metavar="SPEC", help="simulated user; may be given many times")
    parser.add_argument("--assistant", default="smollm2-135m", help="response model of the conversation level")
    parser.add_argument(
        "--bank",
        default="sharegpt",
        help="sharegpt (packaged), or a JSONL file of profiles with conversations",
    )
    parser.add_argument("--split", default="test", help="train, val or test of the bank; all for the whole bank")
    parser.add_argument("-n", "--n", type=at_least(1), metavar="N", help="so many people of the split (default: all)")
    parser.add_argument("--levels", default="utterance,conversation", help="one or both, with a comma between")
    parser.add_argument("--turns", type=at_least(1), default=10, help="most user turns of a conversation")
    parser.add_argument(
        "--most", type=at_least(1), metavar="K", help="at the utterance level a person's first K turns (default: all)"
    )
    parser.add_argument("--seeds", type=at_least(1), default=1, help="generations of each; 2 or more for the collapse alarm")
    parser.add_argument(
        "--protocol", choices=("ours", "paper"), default="ours", help="paper: ADV on both sides' turns, given first turns count"
    )
    parser.add_argument("--judge", metavar="SPEC", help="a model for SC.Score, e.g. openai:NAME@URL")
    parser.add_argument("--embedder", default="auto", help="of Sem-Sim and ADV: auto, minilm, simcse, a folder or a hub id")
    parser.add_argument("--no-neighbours", dest="neighbours", action="store_false", help="leave out the row real:neighbour")
    parser.add_argument("--lanes", type=at_least(1), default=16, help="most generations at a time")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of users and assistant in this process whose specs tell none; a CPU with "
        "bfloat16 units is two to three times as fast with it (default: float32 on a CPU)",
    )
    parser.add_argument("--out", required=True, metavar="DIR|FILE.json", help="run directory, or a card with its run beside it")
    taken = parser.add_mutually_exclusive_group()
    taken.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    taken.add_argument("--overwrite", action="store_true", help="begin anew over a run that is there")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def evaluate(arguments: argparse.Namespace) -> int:
    """`usp-env evaluate`."""
    from usp_env import assistants, users
    from usp_env.evaluation import run, scorers
    from usp_env.evaluation.card import CARD, MARKDOWN
    from usp_env.evaluation.plan import Candidate

    folder, card_file = _places(arguments.out)
    run.check(folder, arguments.resume, arguments.overwrite)
    for file in (card_file, card_file.with_suffix(".md")) if card_file and not (arguments.resume or arguments.overwrite) else ():
        if file.exists():
            raise SpecError(f"--out {file}: the file exists; name another, or say --resume or --overwrite")
    if "human" in (*arguments.user, arguments.assistant):
        raise SpecError("evaluate holds many conversations at a time; a person talks in usp-env chat")
    plan = _plan(arguments)
    source = partial(_engine, dtype=arguments.dtype)
    candidates = [Candidate(spec, users.load(spec, source), takes_profile(spec)) for spec in dict.fromkeys(arguments.user)]
    assistant = assistants.load(arguments.assistant, source) if "conversation" in plan.levels else None
    card = run.evaluate(
        candidates,
        assistant,
        plan,
        scorers.load(arguments.embedder, _judge(arguments.judge, folder)),
        folder,
        card_file,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        report=(lambda text: None) if arguments.quiet else say,
    )
    invalid = ", ".join(f"{outcome} {n}" for outcome, n in card["invalid"].items())
    say(f"{len(candidates)} users, {len(plan.people)} of {len(plan.everyone)} people{'; invalid: ' if invalid else ''}{invalid}")
    say(f"written: {card_file or folder / CARD} ({card_file.with_suffix('.md') if card_file else folder / MARKDOWN} to read)")
    rows = [card["users"][user.name] for user in candidates]
    measured = [entry["mean"] for row in rows for entry in (*row["utterance"].values(), *row["conversation"].values())]
    return 0 if any(mean is not None for mean in measured) else 1


def _engine(spec: ModelSpec, dtype: str | None) -> Backend:
    """The backend of a spec; in this process with this dtype, unless the spec tells one."""
    from usp_env import backends

    told = dtype is None or spec.engine == "openai" or "dtype" in spec.options
    return backends.load(spec if told else replace(spec, options={**spec.options, "dtype": dtype}))


def _plan(arguments: argparse.Namespace) -> Plan:
    from usp_env.evaluation import people
    from usp_env.evaluation.plan import Plan
    from usp_env.sampling import load_fitted

    levels = _levels(arguments.levels)
    split = None if arguments.split == "all" else arguments.split
    everyone = people.load(arguments.bank, split)
    chosen = everyone[: arguments.n]
    return Plan(
        bank=Path(arguments.bank).stem,
        split=arguments.split,
        people=chosen,
        everyone=everyone,
        neighbours=people.neighbours(chosen, arguments.bank) if arguments.neighbours else {},
        levels=levels,
        seeds=tuple(range(arguments.seeds)),
        turns=arguments.turns,
        most=arguments.most,
        paper=arguments.protocol == "paper",
        lanes=arguments.lanes,
        sampler=load_fitted(arguments.bank, split),
    )


def takes_profile(spec: str) -> bool:
    """Whether a user of this spec reads the profile.

    Example:
        >>> takes_profile("usp-mini"), takes_profile("plato-mini"), takes_profile("dialogue:smollm2-135m?temperature=1")
        (True, False, False)
    """
    from usp_env.users import ALIASES

    bare = spec.partition("?")[0]
    return ALIASES.get(bare, bare).partition(":")[0] not in USERS_WITHOUT_PROFILE


def _places(out: str) -> tuple[Path, Path | None]:
    """The run directory, and the card's file where it was named."""
    path = Path(out)
    return (path.with_suffix(""), path) if path.suffix == ".json" else (path, None)


def _levels(text: str) -> tuple[Level, ...]:
    from usp_env.evaluation.card import LEVELS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in LEVELS:
            raise UnknownNameError("level", name, LEVELS)
    if not names:
        raise SpecError(f"--levels: expected {' or '.join(LEVELS)} or both, got {text!r}")
    return tuple(level for level in LEVELS if level in names)


def _judge(spec: str | None, folder: Path) -> Judge | None:
    """The judge, whose verdicts are kept in the run: a resumed run asks for none again."""
    if spec is None:
        return None
    from usp_env import backends
    from usp_env.backends.spec import parse
    from usp_env.evaluation.run import JUDGE
    from usp_env.metrics.judges import Judge

    folder.mkdir(parents=True, exist_ok=True)
    return Judge(backends.load_cached(parse(spec), folder / JUDGE))
