"""Counts finished images over several processes, and shows the count, the rate and the time left."""

import multiprocessing
from types import TracebackType

from cmscale.io.counting import Counting


class ProgressCounter:
    """Counts finished images, or other items, over forked processes: see `Counting`."""

    def __init__(self, what: str, *, total: int, done: int = 0, unit: str = "images") -> None:
        self._count = multiprocessing.get_context("fork").Value("q", done)
        self._counting = Counting(what, total=total, done=done, unit=unit)

    def tick(self) -> None:
        """Counts one finished item; callable from any forked process."""
        with self._count.get_lock():
            self._count.value += 1

    def set(self, done: int) -> None:
        """Sets the number of finished items and shows it."""
        self._count.get_obj().value = done
        self.show()

    def show(self) -> None:
        """Shows the count; call it in the process that made the counter."""
        self._counting.set(self._count.get_obj().value)  # without its lock: who held it may have been killed

    def __enter__(self) -> "ProgressCounter":
        self._counting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show()
        self._counting.__exit__(kind, error, trace)
