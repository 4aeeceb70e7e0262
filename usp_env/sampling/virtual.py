"""Virtual profiles: the objective facts of one person, the subjective characteristics of another (paper §4.4)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from usp_env.profiles import Profile, ProfileBank, combine


def join_neighbours(bank: ProfileBank, neighbours: npt.NDArray[np.intp]) -> list[Profile]:
    """One virtual profile a row: OF of the nearest neighbour, SC of the second nearest.

    The paper draws a point between people and takes one half of each of two neighbours; it leaves open which neighbour
    gives which half. The nearest gives OF here, since OF carries the requests and so decides where the person belongs.

    Args:
        bank: Where the indices point.
        neighbours: (n, >= 2) indices, nearest first.
    """
    return [combine(bank[int(first)], bank[int(second)]) for first, second in neighbours[:, :2]]
