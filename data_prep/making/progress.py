"""Shows a progress bar that several processes advance; shows nothing unless stderr is a terminal."""

import multiprocessing
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f}/s")


class ProgressCounter:
    """Counts finished images, or other items, over forked processes and shows the count as a progress bar."""

    def __init__(self, *, total: int, done: int = 0, what: str = "images") -> None:
        self._count = multiprocessing.get_context("fork").Value("q", done)
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(what, total=total, completed=done)

    def tick(self) -> None:
        """Counts one finished item; callable from any forked process."""
        with self._count.get_lock():
            self._count.value += 1

    def set(self, done: int) -> None:
        """Sets the number of finished items and shows it."""
        self._count.value = done
        self.show()

    def show(self) -> None:
        """Moves the bar to the count; call it in the process that made the counter."""
        self._progress.update(self._task, completed=self._count.value)

    def __enter__(self) -> "ProgressCounter":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show()
        self._progress.stop()
