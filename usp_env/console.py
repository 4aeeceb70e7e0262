"""What the commands write, and the numbers that they take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def say(text: str = "") -> None:
    """One line to standard output."""
    sys.stdout.write(text + "\n")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least so much."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number
