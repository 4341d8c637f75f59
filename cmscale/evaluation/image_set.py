"""Defines what finished samples are to an evaluation, whatever files they are in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """Images of one size. `read()` yields `count` uint8 arrays [H, W, 3] in order, with one in memory.

    `notes()` gives what a result should say about them, one line each, once they have been read.

    Attributes:
        encoding: How their files encode them, several kinds joined by `, `; None for arrays, which are not encoded.
    """

    name: str
    count: int
    height: int
    width: int
    read: Callable[[], Iterator[np.ndarray]]
    notes: Callable[[], list[str]] = list
    encoding: str | None = None
