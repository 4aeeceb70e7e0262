"""What the commands write."""

from __future__ import annotations

import sys


def say(text: str = "") -> None:
    """One line to standard output."""
    sys.stdout.write(text + "\n")
