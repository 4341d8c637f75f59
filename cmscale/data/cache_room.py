"""Shares the space of a node's cache of shards among its processes: counts, reserves, and deletes the oldest."""

import contextlib
import mmap
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cmscale.data.cache_lock import full, hold_minutes, lock_of, locked, state_of
from cmscale.errors import NoSpace
from cmscale.io.durable import NO_SPACE, explained
from cmscale.io.locks import LockTimeout, hold
from cmscale.io.process import node_name
from cmscale.io.remarks import say

T = TypeVar("T")

_LONGEST_PAUSE_SECONDS = 8.0  # between two looks whether other processes' downloads have ended
_FOUND_SECONDS = 120.0  # after which the space that a full disk had is found out anew
_ATTEMPTS_ALONE = 4
_FOUND = ".room"


@dataclass(frozen=True)
class Inventory:
    """What is in a cache.

    Attributes:
        complete: The complete files, as (modification time, bytes, path).
        coming: The files of which downloads go on, as (bytes reserved, bytes on the disk).
    """

    complete: list[tuple[int, int, Path]]
    coming: list[tuple[int, int]]

    @property
    def used(self) -> int:
        """Bytes used and reserved."""
        return sum(length for _, length, _ in self.complete) + sum(reserved for reserved, _ in self.coming)

    @property
    def written(self) -> int:
        """Bytes on the disk."""
        return sum(length for _, length, _ in self.complete) + sum(written for _, written in self.coming)


def inventory(root: Path) -> Inventory:
    """Looks what is in the cache, and removes what killed processes left. The caller holds the cache's lock."""
    found = Inventory([], [])
    parts: dict[Path, list[tuple[int, int, Path]]] = {}
    for path in root.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            status = path.stat()
            if not path.name.startswith("."):
                found.complete.append((status.st_mtime_ns, status.st_size, path))
            elif ".part" in path.name and not path.name.endswith((".lock", ".lock.held")):
                target = path.with_name(path.name.lstrip(".").rpartition(".part")[0])
                length = status.st_size
                parts.setdefault(target, []).append((length, min(length, 512 * status.st_blocks), path))
    for target, files in parts.items():  # a download may use several temporary files: the longest counts
        if not _removed_as_left(target, files):
            reserved = max(length for length, _, _ in files)
            found.coming.append((reserved, min(reserved, sum(written for _, written, _ in files))))
    return found


def _removed_as_left(target: Path, parts: list[tuple[int, int, Path]]) -> bool:
    """Removes what a killed process left of a download: nobody holds its lock. Returns whether that was so."""
    with contextlib.suppress(LockTimeout), hold(lock_of(target), timeout=0, what="data.cache_dir"):
        for _, _, path in parts:
            path.unlink(missing_ok=True)
        return True
    return False


@dataclass
class _Attempt:
    """How a download fares: its own limit, what was known of a full disk before it, and how often it failed alone."""

    limit: int
    known: int | None = None
    alone: int = 0


class Room:
    """The space of the cache at `root`, which all data sets and processes of a node share.

    A download begins when its bytes are reserved: within `limit`, and within what the disk has beyond the bytes that
    other downloads will still write. Where a disk or quota turns out to be full before, what was there then is written
    down for the other processes, and is the limit for some minutes. So no process downloads while it holds the cache's
    lock, and none that waits for room waits for more than the downloads before it.

    Args:
        root: The folder.
        limit: Bytes that all data sets in the cache may use together; the least recently used files are deleted.
        wait: Sleeps.
    """

    def __init__(self, root: Path, limit: int, *, wait: Callable[[float], None]) -> None:
        self.root = root
        self.limit = limit
        self._wait = wait
        self._has_said_full = mmap.mmap(-1, 1)  # shared memory: once for all workers of a rank

    def use(self, part: Path, size: int, download: Callable[[], T]) -> T:
        """Calls `download`, which writes `size` bytes to `part`, when there is room for them. Returns what it does.

        Raises:
            NoSpace: there is none, also with nothing else in the cache.
            RuntimeError: other processes' downloads have the room, and do not go on.
        """
        attempt = _Attempt(self.limit)
        while True:
            try:
                self._reserve(attempt, part, size)
                return download()
            except NoSpace as error:
                part.unlink(missing_ok=True)
                if attempt.alone == _ATTEMPTS_ALONE:
                    raise full(self.root, error) from error
                if attempt.alone:  # deleted files take their space until the last who reads them has closed them
                    self._wait(2.0 ** (attempt.alone - 1))
                self._learn(attempt)

    def _reserve(self, attempt: _Attempt, part: Path, size: int) -> None:
        """Reserves bytes for a download, once there is room.

        The reservation is an empty file of this length, which other processes count until the download is complete.
        """
        pause, since, state = 1.0, time.monotonic(), state_of(self.root)
        while True:
            with locked(self.root / ".lock", root=self.root):
                there = inventory(self.root)
                attempt.known = self._known()
                limit = attempt.limit if attempt.known is None else min(attempt.limit, attempt.known)
                fits = self._delete_for(size, there, limit)
                if fits or not there.coming:
                    attempt.alone += not fits
                    with explained(part), part.open("wb") as file:
                        file.truncate(size)
                    return
            self._wait(pause)  # for the end of downloads that began before
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if time.monotonic() - since > 60 * hold_minutes():
                if state == (state := state_of(self.root)):
                    raise RuntimeError(
                        f"data.cache_dir: {self.root} on {node_name()}: waited {hold_minutes():g} minutes for other "
                        "processes' downloads, which do not go on, to make room; raise data.cache_gb, or free space"
                    )
                since = time.monotonic()

    def _delete_for(self, size: int, there: Inventory, limit: int) -> bool:
        """Deletes the least recently used files until `size` more bytes fit. Returns whether they do."""
        used, written = there.used, there.written
        room = min(limit, written + shutil.disk_usage(self.root).free)
        if there.complete and used + size > room < self.limit and not self._has_said_full[0]:
            self._has_said_full[0] = 1
            where = f"data.cache_dir: {self.root} on {node_name()}"
            say(f"{where}: {NO_SPACE} on the device, before data.cache_gb is used; the oldest shards make room")
        for _, length, path in sorted(there.complete):
            if used + size <= room:
                break
            path.unlink(missing_ok=True)
            used -= length
        return used + size <= room

    def _known(self) -> int | None:
        """What a full disk had room for, found out within the last minutes by any process; None if by none."""
        path = self.root / _FOUND
        with contextlib.suppress(OSError, ValueError):
            if abs(time.time() - path.stat().st_mtime) < _FOUND_SECONDS:
                return int(path.read_text())
        return None

    def _learn(self, attempt: _Attempt) -> None:
        """Writes down for all what the full disk has room for: what is there, without the download that failed.

        Of downloads that fail at once some have removed what they wrote. Half of what is reserved counts at least. One
        that began before another one found that out has nothing to add.
        """
        with locked(self.root / ".lock", root=self.root):
            known = self._known()
            if known is None or known == attempt.known:
                there = inventory(self.root)
                known = max(there.written, there.used // 2)
                with contextlib.suppress(OSError):  # the disk is full
                    (self.root / _FOUND).write_text(str(known))
            attempt.limit = min(attempt.limit, known)
