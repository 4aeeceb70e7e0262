"""`RESULTS.md`: simulated users beside real people, assistants on the leaderboard, and the paper's figures.

    python -m benchmarks.results            runs what is missing into `results/`, then writes the page (hours on 2 cores)
    python -m benchmarks.results --page     only writes the page again

The runs are `usp-env evaluate` and `usp-env benchmark` as the options say; what was interrupted goes on. Of each run the card
and `run.json` (command, commit, seeds, weights) are kept in `results/`; the page is made of them and of nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import paper
from usp_env.errors import UspError
from usp_env.evaluation.card import CARD, COST, LEVELS, METRICS, NEIGHBOUR, REAL, Card, Level, read_card
from usp_env.evaluation.leaderboard import BOARD, Leaderboard, grid
from usp_env.evaluation.markdown import AGAINST, COMPARED, against, cell, invalid, named, plain, scorers, warning
from usp_env.report.board import read_board
from usp_env.transcripts import RUN

USERS = ("usp-mini", "plato-mini", "roleplay:smollm2-135m", "dialogue:smollm2-135m")
ASSISTANTS = ("smollm2-135m", "echo", "known-bad", "spammer", "essay")
PUBLISHED: Mapping[Level, tuple[Sequence[str], Mapping[str, tuple[float | None, ...]], str]] = {
    "utterance": (paper.UTTERANCE_METRICS, paper.UTTERANCE, "Table 3"),
    "conversation": (paper.CONVERSATION_METRICS, paper.CONVERSATION, "Table 4"),
}
OWN_METRICS: Mapping[Level, Sequence[str]] = {
    "utterance": ("human_likeness", "termination_f1"),
    "conversation": ("human_likeness", "turn_count_distance", "adv"),
}
"""What is shown beside the paper's columns."""
MARGINS = ("sem_sim", "style_sim", "ava", "r_dpc", "esr", "turn_count_distance", "adv")


def main() -> None:
    args = parser().parse_args()
    if not args.page:
        run(args)
    text = page(args.results)
    args.out.write_text(text, "utf-8")
    sys.stdout.write(f"written: {args.out}\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--page", action="store_true", help="run nothing")
    made.add_argument("--users", nargs="+", default=USERS)
    made.add_argument("--assistants", nargs="+", default=ASSISTANTS)
    made.add_argument("--split", default="test", help="of the evaluation")
    made.add_argument("-n", type=int, help="people of the split (default: all)")
    made.add_argument("--bench-n", type=int, help="profiles of a population (default: the protocol's)")
    made.add_argument("--turns", type=int, help="most user turns (default: 10)")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the evaluation's models, see usp-env evaluate")
    made.add_argument("--runs", type=Path, default=Path("runs/results"), help="where the runs lie")
    made.add_argument("--results", type=Path, default=Path("results"), help="where the cards are kept")
    made.add_argument("--out", type=Path, default=Path("RESULTS.md"))
    return made


# ── running ──────────────────────────────────────────────────────────────────────────────────────


def run(args: argparse.Namespace) -> None:
    """Evaluate, benchmark, and keep the cards."""
    few = [] if args.n is None else ["-n", str(args.n)]
    turns = [] if args.turns is None else ["--turns", str(args.turns)]
    profiles = [] if args.bench_n is None else ["--n", str(args.bench_n)]
    dtype = [] if args.dtype is None else ["--dtype", args.dtype]
    users = [word for user in args.users for word in ("--user", user)]
    commands = {
        "users": ["evaluate", *users, "--split", args.split, *few, *turns, *dtype],
        "assistants": ["benchmark", "--assistants", *args.assistants, *profiles, *turns],
    }
    for name, words in commands.items():
        folder = args.runs / name
        # The program itself, so that run.json holds a command that anybody can give. Where nothing has begun, --resume begins.
        program = Path(sys.executable).with_name("usp-env")
        if subprocess.run([program, *words, "--out", folder, "--resume"], check=False).returncode:
            raise SystemExit(f"usp-env {shlex.join(words)}: failed; see above (what is in {folder} is not done again)")
        keep(folder, args.results / name)


def keep(folder: Path, place: Path) -> None:
    """Copy a run's card and what it was run with."""
    place.mkdir(parents=True, exist_ok=True)
    for file in (RUN, CARD, BOARD, COST):
        if (folder / file).is_file():
            shutil.copyfile(folder / file, place / file)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────


def page(results: Path) -> str:
    """The page from the kept cards; the same cards give the same page.

    Raises:
        UspError: Neither a quality card nor a leaderboard is there.
    """
    parts = []
    if (results / "users").is_dir():
        parts += users_part(read_card(results / "users"), facts(results / "users"))
    if (results / "assistants").is_dir():
        parts += assistants_part(read_board(results / "assistants"), facts(results / "assistants"))
    if not parts:
        raise UspError(f"{results}: expected users/{CARD} or assistants/{BOARD}; python -m benchmarks.results makes them")
    head = [
        "# Results",
        "",
        "Written by `make results`; nothing here is typed by hand. Rows *in italics* are printed in the paper "
        f"({paper.PAPER}): an 8B model on LMSYS-Chat-1M, other embedders and judges, so that margins compare and levels do not.",
        "",
    ]
    return "\n".join([*head, *parts]).rstrip("\n") + "\n"


def facts(folder: Path) -> Mapping[str, Any]:
    """`run.json`."""
    read: dict[str, Any] = json.loads((folder / RUN).read_text("utf-8"))
    return read


def provenance(run: Mapping[str, Any], weights: Mapping[str, str | None]) -> Iterator[str]:
    """How to run it again, and what was run: as it was last, and every commit that had a part in it.

    Args:
        run: `run.json`.
        weights: Model to digest.
    """
    runs = [run, *run.get("resumed", [])]
    words = [word for word in runs[-1]["command"] if word != "--resume"]
    yield f"`{shlex.join(words)}`"
    yield ""
    commits = list(dict.fromkeys(str(one["commit"])[:7] for one in runs))
    versions = ", ".join(f"{name} {version}" for name, version in runs[-1]["versions"].items())
    told = f"Commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    yield f"{told}; {versions}; {', '.join(runs[-1]['hardware'].values())}."
    digests = [f"`{name}` {'+'.join(part[:12] for part in found.split('+'))}" for name, found in weights.items() if found]
    if digests:
        yield f"Weights: {', '.join(digests)}."
    yield ""


def users_part(card: Card, run: Mapping[str, Any]) -> list[str]:
    """Both levels beside the paper's tables, and the margins."""
    people = card["people"]
    weights = {spec: found.get("weights") for spec, found in run["provenance"]["models"].items()}
    lines = [
        "## Simulated users",
        "",
        *provenance(run, weights),
        f"{people['n']} of {people['of']} people of `{card['bank']}` ({card['split']}), assistant `{card['assistant']}`, at most "
        f"{card['turns']} user turns, seeds {', '.join(map(str, card['seeds']))}. {scorers(card)} Cells: mean [95 % interval "
        "over people and seeds] n people *the same by the held-out scorer*, which no model is trained by. `real`: the people "
        "themselves, similarities between their odd and even turns; `real:neighbour`: somebody else with the nearest objective "
        "facts.",
        "",
    ]
    for level in LEVELS:
        if any(user[level] for user in card["users"].values()):
            lines += level_table(card, level)
    losses = ["### Invalid", "", *found] if (found := invalid(card)) else []
    return [*lines, *margins(card), *adv_curves(card), *losses]


def level_table(card: Card, level: Level) -> list[str]:
    """Ours, then the paper's."""
    columns, published, table = PUBLISHED[level]
    names = [*columns, *OWN_METRICS[level]]
    rows = [
        [named(card, user, level), *(cell(own[level].get(name)) for name in names)]
        for user, own in card["users"].items()
        if own[level]
    ]
    blank = ["–"] * len(OWN_METRICS[level])
    rows += [[f"*{name}*", *(f"*{plain(value)}*" for value in values), *blank] for name, values in published.items()]
    head = ["user", *(METRICS[name].heading for name in names)]
    return [f"### {level.capitalize()} level ({table})", "", grid(head, rows), "", *warning(card, level)]


def margins(card: Card) -> list[str]:
    """What the first user has over each of the others, beside what the paper claims."""
    simulated = [name for name in card["users"] if name not in (REAL, NEIGHBOUR)]
    found = card["users"][simulated[0]]["differences"].get("conversation", {}) if simulated else {}
    rows = [
        [METRICS[name].label, *against(own), claimed(name) if not rank else ""]
        for name in MARGINS
        for rank, own in enumerate(found.get(name, []))
    ]
    if not rows:
        return []
    text = f"`{simulated[0]}` against every rival at the conversation level, the hardest first. {COMPARED}"
    return ["### Margins", "", text, "", grid(["metric", "rival", *AGAINST, "ratio in the paper"], rows), ""]


def claimed(name: str) -> str:
    """The paper's margin over its best baseline, or what it says in its place."""
    if name not in paper.CONVERSATION_METRICS:
        return f"*{paper.CLAIMS[name]}*" if name in paper.CLAIMS else "–"
    baseline, ratio = paper.margin(name, METRICS[name].higher_is_better is not False)
    return f"*{ratio:.2f} (over {baseline})*"


def adv_curves(card: Card) -> list[str]:
    """The paper's Figure 3 as a table: ADV at every percentile."""
    details = {user: own["conversation"].get("adv", {}).get("detail", {}) for user, own in card["users"].items()}
    found = {user: detail for user, detail in details.items() if "curve" in detail}
    if not found:
        return []
    percentiles = next(iter(found.values()))["percentiles"]
    rows = [[f"{at}", *(plain(detail["curve"][k]) for detail in found.values())] for k, at in enumerate(percentiles)]
    text = (
        f"{METRICS['adv'].heading} ({METRICS['adv'].unit}) at percentiles of the conversations. Who is given no profile is "
        "measured from its second turn on; the difference above is without first turns on both sides."
    )
    head = ["percentile", *(named(card, user, "conversation") for user in found)]
    return ["### ADV by percentile", "", text, "", grid(head, rows), ""]


def assistants_part(board: Leaderboard, run: Mapping[str, Any]) -> list[str]:
    """The leaderboard's own page, one heading lower, then Table 7."""
    own = board.markdown().replace("\n## ", "\n### ").removeprefix(f"# {board.protocol}\n")
    rows = [[f"*{name}*", *(f"*{value:.2f}*" for value in values)] for name, values in paper.ASSISTANTS.items()]
    published = ["### In the paper (Table 7; 1 to 10 by GPT-4o)", "", grid(["assistant", *paper.POPULATIONS], rows), ""]
    weights = {board.settings["user"]: board.settings["user_weights"]} | {row.assistant: row.weights for row in board.rows}
    return [f"## Assistants: `{board.protocol}`", "", *provenance(run, weights), own.strip("\n"), "", *published]


if __name__ == "__main__":
    main()
