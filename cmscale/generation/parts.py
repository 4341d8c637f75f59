"""Stores samples in parts while a set is drawn: arrays of consecutive samples, one file each, in any storage.

A part is the unit of work and of progress. It does not depend on the rank that drew it, so a set that was interrupted
continues with the missing parts, on any number of ranks. One part at a time is in memory.
"""

import io
import shutil
import sys
from collections.abc import Iterator

import numpy as np

from cmscale.errors import UserError
from cmscale.io.protocol import Storage
from cmscale.io.reading import reading
from cmscale.runs.sample_sets import part_name


class Parts:
    """The parts of a set of `count` samples.

    Args:
        storage: Their folder.
        size: Samples of a part; the last may be shorter.
    """

    def __init__(self, storage: Storage, *, count: int, size: int) -> None:
        self._storage, self._count, self._size = storage, count, size

    def all(self) -> list[range]:
        """The ranges of samples of all parts."""
        return [range(at, min(at + self._size, self._count)) for at in range(0, self._count, self._size)]

    def missing(self) -> list[range]:
        """The parts that are not stored, in order."""
        stored = {entry.key for entry in self._storage.list("part-")}
        return [part for part in self.all() if part_name(part.start) not in stored]

    def commit(self, part: range, images: np.ndarray) -> None:
        """Stores a part: readers see all of it or nothing."""
        assert len(images) == len(part)
        buffer = io.BytesIO()
        np.save(buffer, images, allow_pickle=False)
        self._storage.write(part_name(part.start), buffer.getvalue())

    def read(self, part: range) -> np.ndarray:
        """The samples of a part.

        Raises:
            UserError: it is missing or damaged.
        """
        name = part_name(part.start)
        raw = self._storage.read_if_present(name)
        where = self._storage.join(name)
        if raw is None:
            raise UserError(f"{where}: is gone; the same command draws it again")
        with reading(where, "a part of samples", advice="remove it: the same command draws it again"):
            images = np.load(io.BytesIO(raw), allow_pickle=False)
            if len(images) != len(part):
                raise ValueError(f"{len(images)} samples in place of {len(part)}")
        return images

    def rows(self, wanted: range) -> Iterator[np.ndarray]:
        """The samples of a range, one after the other."""
        for part in self.all()[wanted.start // self._size :]:
            if part.start >= wanted.stop:
                return
            inside = range(max(part.start, wanted.start), min(part.stop, wanted.stop))
            yield from self.read(part)[inside.start - part.start : inside.stop - part.start]

    def remove(self) -> None:
        """Removes the parts, and all else that lies in their folder."""
        folder = self._storage.local_path("")
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            self._storage.delete_all([entry.key for entry in self._storage.list()])
        except UserError as error:
            print(f"note: what is no longer needed stays in {self._storage.url} ({error})", file=sys.stderr)
