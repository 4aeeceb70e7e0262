"""Keys and values that outlive a call, so that a conversation's next turn does not read its history again.

    store = PrefixStore(2**30)
    store.keep("base", token_ids, states)     # states: (layers, 2, heads, len(token_ids), head size)
    states = store.find("base", prompt)       # of the longest kept beginning of the prompt, or None

What is found always belongs to the very ids that were asked for: hashes only propose, ids decide. The least recently
used rows make room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from usp_env.errors import require

require("torch", "hf")
from torch import Tensor  # noqa: E402

BLOCK = 16
"""Beginnings are looked up in steps of so many tokens; a shorter one is not worth keeping."""


@dataclass(frozen=True, slots=True)
class _Row:
    ids: np.ndarray
    states: Tensor
    keys: tuple[int, ...]  # one per block: a hash of everything up to its end

    @property
    def size(self) -> int:
        return self.states.element_size() * self.states.numel()


class PrefixStore:
    """Rows of keys and values, found by the longest common beginning.

    Args:
        max_bytes: Most memory of the rows kept.

    Example:
        >>> import torch
        >>> store = PrefixStore(2**20)
        >>> store.keep("base", range(40), torch.zeros(1, 2, 1, 40, 4))
        >>> found = store.find("base", [*range(35), 7, 7])
        >>> found.shape[-2]
        35
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._rows: OrderedDict[int, _Row] = OrderedDict()  # by serial number, the least recently used first
        self._index: dict[int, int] = {}  # a beginning's hash to the newest row that has it
        self._serial = 0

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, owner: str, prompt: Sequence[int]) -> Tensor | None:
        """States of the longest kept beginning of `prompt`; never of all of it, since its last token has to be fed.

        Args:
            owner: Whose weights made them (an adapter's name).
            prompt: Token ids.
        """
        ids = np.asarray(prompt)
        serial, common = self._longest(ids, _chain(owner, ids))
        common = min(common, len(ids) - 1)
        if serial is None or common < BLOCK:
            return None
        self._rows.move_to_end(serial)
        return self._rows[serial].states[..., :common, :]

    def keep(self, owner: str, token_ids: Sequence[int], states: Tensor) -> None:
        """Keep a row; it takes the place of a row that it goes on from."""
        ids = np.asarray(token_ids)
        row = _Row(ids, states, tuple(_chain(owner, ids)))
        if not row.keys or row.size > self.max_bytes:
            return
        serial, common = self._longest(ids, row.keys)
        if serial is not None and common == len(self._rows[serial].ids):
            self._drop(serial)
        while self.bytes + row.size > self.max_bytes:
            self._drop(next(iter(self._rows)))
        self._serial += 1
        self._rows[self._serial] = row
        self._index.update(dict.fromkeys(row.keys, self._serial))
        self.bytes += row.size

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._rows.clear()
        self._index.clear()
        self.bytes = 0

    def _longest(self, ids: np.ndarray, keys: Sequence[int] | Iterator[int]) -> tuple[int | None, int]:
        """The row with the longest common beginning, and its length."""
        for key in reversed(tuple(keys)):
            if (serial := self._index.get(key)) is not None:
                other = self._rows[serial].ids
                length = min(len(ids), len(other))
                differ = np.flatnonzero(ids[:length] != other[:length])
                return serial, int(differ[0]) if len(differ) else length
        return None, 0

    def _drop(self, serial: int) -> None:
        row = self._rows.pop(serial)
        self.bytes -= row.size
        for key in row.keys:
            if self._index.get(key) == serial:
                del self._index[key]


def _chain(owner: str, ids: np.ndarray) -> Iterator[int]:
    """A hash of (owner, ids up to here) at the end of every whole block."""
    key = hash(owner)
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        key = hash((key, ids[end - BLOCK : end].tobytes()))
        yield key
