"""Gymnasium spaces for free text.

`gymnasium.spaces.Text` takes a fixed, by default alphanumeric charset; people write more than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np

_WORDS = "the a what how can you please explain write give me more about that this thanks why is it do we code list".split()


class Utterance(gym.Space[str]):
    """Any text of valid Unicode with 1 to `max_chars` characters that is not blank.

    Args:
        max_chars: Most characters.
        seed: Seed of `sample`.

    Example:
        >>> Utterance().contains("naïve café – 你好"), Utterance(4).contains("hello"), Utterance().contains("")
        (True, False, False)
    """

    def __init__(self, max_chars: int = 16_000, seed: int | np.random.Generator | None = None) -> None:
        self.max_chars = max_chars
        super().__init__(dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Text has no fixed size."""
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A short sentence of common words."""
        count = int(self.np_random.integers(1, 9))
        words = " ".join(_WORDS[i] for i in self.np_random.integers(len(_WORDS), size=count))
        return words[: self.max_chars]

    def contains(self, x: Any) -> bool:
        """Whether `x` is an utterance."""
        return isinstance(x, str) and len(x) <= self.max_chars and bool(x.strip()) and is_unicode(x)

    def __eq__(self, value: object) -> bool:
        return isinstance(value, Utterance) and value.max_chars == self.max_chars

    def __hash__(self) -> int:
        return hash((type(self), self.max_chars))

    def __repr__(self) -> str:
        return f"Utterance(max_chars={self.max_chars})"


class Messages(gym.Space[tuple[dict[str, str], ...]]):
    """A conversation: a tuple of `{"role", "content"}` dicts with roles `system`, `user`, `assistant`.

    Args:
        seed: Seed of `sample`.

    Example:
        >>> Messages().contains(({"role": "user", "content": "hi"},))
        True
    """

    roles = ("system", "user", "assistant")

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(dtype=object, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """A conversation has no fixed size."""
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> tuple[dict[str, str], ...]:
        """A conversation of one to five utterances, beginning with the user's."""
        count = int(self.np_random.integers(1, 6))
        text = Utterance(seed=self.np_random)
        return tuple({"role": self.roles[1 + i % 2], "content": text.sample()} for i in range(count))

    def contains(self, x: Any) -> bool:
        """Whether `x` is a conversation."""
        return isinstance(x, tuple) and all(
            isinstance(m, dict) and m.keys() == {"role", "content"} and m["role"] in self.roles and isinstance(m["content"], str)
            for m in x
        )

    def to_jsonable(self, sample_n: Iterable[tuple[dict[str, str], ...]]) -> list[Any]:
        """Lists of dicts."""
        return [list(sample) for sample in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[Any]:
        """The inverse of `to_jsonable`."""
        return [tuple(sample) for sample in sample_n]

    def __eq__(self, value: object) -> bool:
        return isinstance(value, Messages)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return "Messages()"


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded (holds no lone surrogate).

    Example:
        >>> is_unicode("a"), is_unicode(chr(0xD800))
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
