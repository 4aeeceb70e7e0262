"""Every error the project raises on purpose.

    UspError
    ├── ProfileFormatError      a line of a profile bank that breaks its format
    ├── TranscriptError         a transcript file that is truncated, foreign or edited
    ├── RunDirectoryError       an output directory that may not be written as asked
    ├── UnknownNameError        a name (population, profile, model, option, …) that nothing answers to
    ├── SpecError               a model spec, reward expression or option with a bad value
    ├── InvalidActionError      an action that is not a `str` (also a `TypeError`)
    ├── CallOrderError          `step` before `reset`, or after the end (also Gymnasium's `ResetNeeded`)
    ├── MissingAssetError       weights or data that have to be fetched first
    ├── MissingExtraError       an optional dependency that is not installed (also an `ImportError`)
    ├── TrainingError           training cannot go on: a loss that is not finite, a checkpoint that cannot be read
    ├── CacheMissError          a request that a strict replay cache does not hold
    └── BackendError            a model or server failed after its retries: the episode's `infra_failure`

What a programmer wrote wrong raises. What a model wrote never does: it ends the episode with a typed
outcome (see `usp_env.episode`). Every message says what was expected, what came, and how to mend it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

from gymnasium.error import ResetNeeded


class UspError(Exception):
    """Base of all errors raised by `usp_env`."""


class ProfileFormatError(UspError, ValueError):
    """A profile bank holds a line that breaks the format; the message names file, line and field."""


class TranscriptError(UspError, ValueError):
    """A transcript cannot be read or replayed; the message names file, line and field."""


class RunDirectoryError(UspError, FileExistsError):
    """An output path is taken, or belongs to a run with another configuration."""


class SpecError(UspError, ValueError):
    """A model spec, reward expression, option or argument has a value that is not allowed."""


class InvalidActionError(UspError, TypeError):
    """The action handed to `step` is not a `str`."""


class CallOrderError(UspError, ResetNeeded):
    """`step` was called before `reset`, or after the episode's end."""


class MissingAssetError(UspError, FileNotFoundError):
    """Weights or data are not on this machine; the message holds the command that fetches them."""


class MissingExtraError(UspError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


class CacheMissError(UspError, LookupError):
    """A strict replay cache was asked for a generation that it does not hold."""


class TrainingError(UspError, RuntimeError):
    """A training run cannot go on; the message says what was found and where to resume."""


class BackendError(UspError, RuntimeError):
    """A model or server failed after its retries. Environments turn it into an `infra_failure`."""


class UnknownNameError(UspError, LookupError):
    """A name that nothing answers to.

    Args:
        kind: What was named, e.g. `"population"`.
        name: The name that came.
        known: The names that would do; the nearest is suggested.

    Example:
        >>> str(UnknownNameError("population", "minorty", ["density", "minority"]))
        "unknown population 'minorty': did you mean 'minority'? Known: density, minority"
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
        super().__init__(f"unknown {kind} {name!r}: {hint}Known: {shown or 'none'}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module!r} is needed here and cannot be imported ({error}): pip install 'usp-env[{extra}]'"
        ) from error
