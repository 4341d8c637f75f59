"""Shows how many bytes of files a command has read, fetched or sent while it waits for them.

Whoever knows what is waited for opens `showing`; whatever moves bytes tells `current`. Without anybody who shows them,
as in the background of a training, they are not counted.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cmscale.io.counting import Counting

_BYTES = 10**6
_POLL_SECONDS = 1.0
_of_thread = threading.local()


class Traffic:
    """Counts bytes of `total`, from any thread."""

    def __init__(self, counting: Counting, total: int | None) -> None:
        self._counting = counting
        self._total = total
        self._lock = threading.Lock()
        self._bytes = 0

    def moved(self, count: int) -> None:
        """Counts bytes that were moved."""
        with self._lock:
            self._set(self._bytes + count)

    def reached(self, count: int) -> None:
        """Sets the number of bytes that have been moved by now."""
        with self._lock:
            self._set(count)

    def _set(self, count: int) -> None:
        self._bytes = count
        if self._total is None:
            self._counting.set(_megabytes(count))
        else:
            self._counting.set(_megabytes(self._total) if count >= self._total else count / _BYTES)


@contextmanager
def showing(what: str, total: int | None) -> Iterator[Traffic]:
    """Shows how many of `total` bytes are moved while the block runs; within another `showing` they count for that.

    Of the ranks of a job the first alone shows anything.

    Args:
        what: What is waited for, in words: `uploading model.safetensors`.
        total: None if it is unknown.
    """
    outer = current()
    if outer is not None:
        yield outer
        return
    active = os.environ.get("RANK", "0") == "0"
    with Counting(what, total=None if total is None else _megabytes(total), unit="MB", active=active) as counting:
        adopt(Traffic(counting, total))
        try:
            yield _of_thread.traffic
        finally:
            adopt(None)


def _megabytes(total: int) -> int:
    """What is shown of a number of bytes: rounded up, as less than one is shown, too."""
    return max(1, -(-total // _BYTES))


def current() -> Traffic | None:
    """What the bytes count for that this thread moves; None for nothing."""
    return getattr(_of_thread, "traffic", None)


def adopt(traffic: Traffic | None) -> None:
    """Lets the bytes that this thread moves count for what another thread shows: the start of a pool's threads."""
    _of_thread.traffic = traffic


def moved(count: int) -> None:
    """Counts bytes that this thread has moved, if anybody shows them."""
    if (traffic := current()) is not None:
        traffic.moved(count)


@contextmanager
def attempt(count: Callable[[int], None] = moved) -> Iterator[Callable[[int], None]]:
    """Gives what counts the bytes of one attempt; if it fails they are taken back, as the next one moves them again.

    Args:
        count: What counts them beyond: the whole of which this is a part.
    """
    counted: list[int] = []

    def of_this(bytes_moved: int) -> None:
        counted.append(bytes_moved)
        count(bytes_moved)

    try:
        yield of_this
    except BaseException:
        count(-sum(counted))
        raise


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    """Counts the bytes that a library writes into an empty folder while the block runs, by the sizes of its files."""
    traffic, ended = current(), threading.Event()
    if traffic is None:
        yield
        return

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            traffic.reached(_size_of(folder))

    watcher = threading.Thread(target=watch, name="watching", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size
    return total
