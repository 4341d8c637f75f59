"""Owns the progress bar of the data commands: fed by several processes, silent where nobody watches."""

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


class Ticker:
    """Counts finished items over processes (`tick`), and shows them (`show`, also called by `tick` in its
    own)."""

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
        """One more item is done; from any forked process."""
        with self._count.get_lock():
            self._count.value += 1

    def set(self, done: int) -> None:
        """So many items are done; shown at once."""
        self._count.value = done
        self.show()

    def show(self) -> None:
        """Moves the bar to the count; in the process that made it."""
        self._progress.update(self._task, completed=self._count.value)

    def __enter__(self) -> "Ticker":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show()
        self._progress.stop()
