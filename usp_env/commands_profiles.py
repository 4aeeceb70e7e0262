"""What `usp-env profiles …` does; `usp_env.cli` parses it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from usp_env.backends.base import Generation
from usp_env.backends.spec import parse
from usp_env.console import say
from usp_env.errors import SpecError
from usp_env.extraction.store import files_of
from usp_env.profiles import Profile, ProfileBank
from usp_env.records import Reply


def extract(arguments: argparse.Namespace) -> int:
    """`usp-env profiles extract`."""
    from usp_env.data.conversations import load
    from usp_env.extraction.distilled import Distilled
    from usp_env.extraction.extractor import Extractor
    from usp_env.extraction.run import Source, extract_bank, parse_shares
    from usp_env.ledger import Account

    spec, account, shares = parse(arguments.model or arguments.generator), Account(), parse_shares(arguments.splits)
    for name, file in (("the source", arguments.source), ("--ids", arguments.ids)):
        if file and (taken := _written_over(Path(file), arguments.out)):
            raise SpecError(
                f"--out {arguments.out}: {name} {file} is {taken} of this run and would be written over: choose another"
            )
    ids = _ids(arguments.ids) if arguments.ids else None
    conversations = load(arguments.source, format=arguments.format, split=arguments.split, ids=ids)

    def watch(seconds: float, made: Sequence[Generation]) -> None:
        account.note(seconds, [Reply(g.text, generation=g, error=g.error) for g in made], spec.prices)

    extractor: Source
    if arguments.generator:
        extractor = Distilled.from_spec(arguments.generator, watch)
    else:
        extractor = Extractor.from_spec(
            spec,
            retries=arguments.retries,
            seed=arguments.seed,
            context=arguments.context,
            structured=not arguments.plain,
            watch=watch,
        )
    names = ("pii", "text", "batch", "limit", "resume", "overwrite", "retry_dropped")
    options = {name: getattr(arguments, name) for name in names}
    config = {"source": arguments.source, "format": arguments.format, "split": arguments.split, "ids": arguments.ids}
    tally = extract_bank(
        conversations,
        arguments.out,
        extractor,
        splits=shares,
        config=config,
        report=lambda tally: say(f"{tally}; {account}"),
        **options,
    )
    for reason, count in tally.dropped.most_common(10):
        say(f"  dropped {count}: {reason}")
    say(f"{tally}\nthis run: {account}\nwritten: {arguments.out} (usp-env profiles show --bank {arguments.out})")
    return 0


def _written_over(file: Path, out: str) -> str:
    """Which of the files that an extraction to `out` writes a file is; empty if none."""
    for path in files_of(out):
        if path == file or (file.is_file() and path.is_file() and file.samefile(path)):
            return f"the file {path.name}"
    return ""


def _ids(file: str) -> frozenset[str]:
    try:
        ids = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"--ids {file}: expected a JSON list of ids ({error})") from error
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise SpecError(f"--ids {file}: expected a JSON list of ids, got {str(ids)[:60]}")
    return frozenset(ids)


def show(arguments: argparse.Namespace) -> int:
    """`usp-env profiles show`."""
    bank = ProfileBank.load(arguments.bank)
    if arguments.id:
        profile = bank.get(arguments.id)
        say(f"{profile.id} ({profile.split or 'no split'}, {profile.source})\n\n{profile}")
        for detail in profile.task_details:
            say(f"  · {detail}")
        return 0
    for split in sorted({profile.split or "none" for profile in bank}):
        say(f"{bank.name}: {sum((profile.split or 'none') == split for profile in bank):6} profiles in {split}")
    where = "" if arguments.bank == "sharegpt" else f" --bank {arguments.bank}"
    say(f"e.g. usp-env profiles show {bank[0].id}{where}")
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """`usp-env profiles sample`."""
    sampler, drawn = _drawn(arguments)
    if arguments.out:
        if Path(arguments.out).exists():
            raise SpecError(f"--out {arguments.out}: the file exists; name another")
        ProfileBank(list({p.id: p for p in drawn}.values()), Path(arguments.out).stem).save(arguments.out)
    for profile in drawn:
        say(f"── {profile.id}\n{profile}\n")
    return 0


def plot(arguments: argparse.Namespace) -> int:
    """`usp-env profiles plot`."""
    from usp_env.sampling import diagnostics

    sampler, drawn = _drawn(arguments)
    out = arguments.out or "profiles.png"
    diagnostics.plot(sampler, {arguments.population: drawn}, out)
    say(out)
    return 0


def _drawn(arguments: argparse.Namespace) -> tuple[Any, list[Profile]]:
    from usp_env.sampling import load_sampler

    sampler = load_sampler(arguments.bank, None if arguments.split == "all" else arguments.split)
    draws = sampler.draw(arguments.n, arguments.population, np.random.default_rng(arguments.seed))
    return sampler, [draw.profile for draw in draws]
