"""What `usp-env benchmark` does; `usp_env.cli` parses it, with the options that stand here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from usp_env import backends
from usp_env.backends.base import Backend
from usp_env.backends.scripted import ScriptedBackend
from usp_env.backends.spec import ModelSpec, parse
from usp_env.console import at_least, say
from usp_env.errors import SpecError, UnknownNameError
from usp_env.evaluation.protocol import PROTOCOLS, Protocol
from usp_env.files import write_whole

OVERRIDES = ("bank", "split", "populations", "n", "seed", "seeds", "turns")
"""Options that depart from the protocol where they are given."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `usp-env benchmark`."""
    parser.add_argument(
        "--assistants",
        nargs="+",
        metavar="SPEC",
        help="who is compared: specs as in play, and the anchors spammer, essay, ladder-good, ladder-mid, ladder-bad",
    )
    parser.add_argument("--protocol", default="usp-bench-1", help="what is fixed; any override is listed on the leaderboard")
    parser.add_argument("--user", nargs="+", metavar="SPEC", help="simulated user (the protocol's); several with --ladder")
    parser.add_argument("--populations", nargs="+", metavar="NAME", help="majority minority virtual, or others of the bank")
    parser.add_argument("--n", type=at_least(1), metavar="N", help="most profiles of a population (100; fewer if it has fewer)")
    parser.add_argument("--turns", type=at_least(1), metavar="N", help="most user turns (10)")
    parser.add_argument("--seed", type=at_least(0), help="of profiles and noise (0)")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", metavar="S", help="episodes of a profile: one for each (0)")
    parser.add_argument("--bank", help="sharegpt or sharegpt-silver (packaged), or a JSONL file of profiles")
    parser.add_argument("--split", help="train, val or test of the bank (test); all for the whole bank")
    parser.add_argument("--judge", help="spec of a model that rates conversations from 1 to 10; offline: GoalProgress (default)")
    parser.add_argument(
        "--pairwise", action="store_true", help="let the judge compare conversations too, in both orders, for Elo"
    )
    parser.add_argument("--reference", metavar="FILE", help="JSON object of names and scores to correlate the ranking with")
    parser.add_argument("--ladder", action="store_true", help="do user and score rank assistants whose order is known?")
    parser.add_argument("--lanes", type=at_least(1), default=16, help="conversations at a time")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory that is written")
    taken = parser.add_mutually_exclusive_group()
    taken.add_argument("--resume", action="store_true", help="finish what was interrupted; assistants may be added")
    taken.add_argument("--overwrite", action="store_true", help="begin anew over what is there")
    parser.add_argument("--cache", metavar="FILE", help="store of recorded generations")
    parser.add_argument("--cache-mode", choices=("record", "replay", "strict"), default="record", help="as in play")


def benchmark(arguments: argparse.Namespace) -> int:
    """`usp-env benchmark`."""
    protocol = _protocol(arguments)
    users = arguments.user or [protocol.user]
    if not arguments.ladder and len(users) > 1:
        raise SpecError(f"--user: expected one user (several with --ladder), got {len(users)}")
    if not arguments.ladder and not arguments.assistants:
        raise SpecError("--assistants: expected at least one assistant, e.g. --assistants smollm2-135m echo known-bad")
    if not arguments.ladder:
        board = _run(arguments, replace(protocol, user=users[0]), Path(arguments.out), arguments.assistants)
        say(board.markdown() + f"\nwritten: {arguments.out}")
        return 0
    return _ladder(arguments, protocol, users)


def _ladder(arguments: argparse.Namespace, protocol: Protocol, users: list[str]) -> int:
    """One benchmark of the ladder's assistants (and any others) per user; status 1 where one is not ranked in order."""
    from usp_env.evaluation.benchmark_play import clear, slug
    from usp_env.evaluation.validity import LADDER, ladder
    from usp_env.users import load as load_user

    for user in users:
        load_user(user, lambda spec: ScriptedBackend([], spec=str(spec)))  # a mistake in the last one should cost nothing
    for user in users if arguments.overwrite else ():  # all at once: --resume after a kill must not take an older ladder's rest
        clear(Path(arguments.out) / slug(user))
        (Path(arguments.out) / "ladder.json").unlink(missing_ok=True)
    reports = []
    for user in users:
        names = list(dict.fromkeys([*LADDER, *(arguments.assistants or ())]))
        board = _run(arguments, replace(protocol, user=user), Path(arguments.out) / slug(user), names)
        reports.append(ladder(board))
        told = " > ".join(f"{rung} {_mean(at.mean)}" for rung, at in reports[-1].averages.items())
        say(f"{user}: {told}: " + ("in order" if reports[-1].ordered else "NOT in order"))
    write_whole(Path(arguments.out) / "ladder.json", json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    say(f"written: {arguments.out}")
    return 0 if all(report.ordered for report in reports) else 1


def _mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _protocol(arguments: argparse.Namespace) -> Protocol:
    """The named protocol with what the command line overrides."""
    if arguments.protocol not in PROTOCOLS:
        raise UnknownNameError("protocol", arguments.protocol, PROTOCOLS)
    given: dict[str, Any] = {}
    for name in OVERRIDES:
        if (value := getattr(arguments, name)) is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    return replace(PROTOCOLS[arguments.protocol][0], **given)


def _run(arguments: argparse.Namespace, protocol: Protocol, out: Path, names: list[str]) -> Any:
    from usp_env.evaluation.benchmark import benchmark as play
    from usp_env.metrics.judges import Judge

    source = _source(arguments)
    judge = None if arguments.judge in (None, "offline") else Judge(source(parse(arguments.judge)))
    return play(
        names,
        out,
        protocol,
        judge=judge,
        pairwise=arguments.pairwise,
        reference=arguments.reference,
        lanes=arguments.lanes,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        source=source,
        say=say,
    )


def _source(arguments: argparse.Namespace) -> Callable[[ModelSpec], Backend]:
    if not arguments.cache:
        return backends.load
    return lambda spec: backends.load_cached(spec, arguments.cache, arguments.cache_mode)
