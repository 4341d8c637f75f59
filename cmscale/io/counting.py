"""Shows how much of a long work is done, how fast it goes and how long it still takes.

On a terminal that is a bar, of which nothing stays if the work was short. Elsewhere (in the log of a job, through a
pipe) it is a line on stderr now and then: the first after ten seconds, then one a minute, and one at the end, so that
nothing long is silent.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, ClassVar, TextIO, TypeVar

T = TypeVar("T")

FIRST_SECONDS = 10.0
EVERY_SECONDS = 60.0
_SHORT_SECONDS = 1.0


class Counting:
    """Counts the finished items of a work.

    Args:
        what: The work, in words: `sampling`.
        total: The number of its items; None if it is unknown, as of a download whose server does not say.
        done: Those that were finished before.
        unit: What an item is, in the plural.
        active: Whether anything is shown: ranks but the first show nothing.
        stream: Where lines go; stderr by default.
        clock: Gives the time in seconds; for tests.
    """

    _on_terminal: ClassVar[bool] = False  # one bar at a time: what is counted while one is shown, is not shown

    def __init__(
        self,
        what: str,
        *,
        total: int | None,
        done: int = 0,
        unit: str = "images",
        active: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._unit = what, unit
        self._total, self._done, self._before = total, float(done), done
        self._active = active
        self._stream = stream
        self._clock = clock
        self._began = clock()
        self._next = self._began + FIRST_SECONDS
        self._has_said = False
        self._bar: Any = None
        self._task: Any = None

    def advance(self, count: float = 1) -> None:
        """Counts finished items; parts of one, too."""
        self.set(self._done + count)

    def set(self, done: float) -> None:
        """Sets the number of finished items, those before included."""
        self._done = done
        if not self._active:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._shown(), **self._fields(self._left()))
        elif self._clock() >= self._next:
            self._next = self._clock() + EVERY_SECONDS
            self._has_said = True
            self._say(f"{self._what}: {self._count()}", self._rate(), self._left())

    @property
    def done(self) -> float:
        """The number of finished items, those before included."""
        return self._done

    def __enter__(self) -> "Counting":
        stream = sys.stderr if self._stream is None else self._stream
        if self._active and stream is not None and stream.isatty():
            if Counting._on_terminal:
                self._active = False
                return self
            Counting._on_terminal = True
            self._bar = _bar(stream)
            self._bar.start()
            self._task = self._bar.add_task(
                self._what, total=self._total, completed=self._done, **{**self._fields(""), "rate": ""}
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            took = self._clock() - self._began
            self._bar.update(self._task, **self._fields(f"in {in_words(took)}"))
            self._bar.live.transient = took < _SHORT_SECONDS
            self._bar.stop()
            Counting._on_terminal = False
        elif self._has_said and kind is None:
            self._say(f"{self._what}: {self._count()} in {in_words(self._clock() - self._began)}", self._rate())

    def _fields(self, left: str) -> dict[str, str]:
        """What stands behind the bar."""
        of = "" if self._total is None else f"/{self._total}"
        return {
            "count": f"{int(self._shown())}{of} {self._unit}",
            "rate": self._rate(),
            "left": left,
        }

    def _count(self) -> str:
        of = "" if self._total is None else f" of {self._total}"
        return f"{int(self._shown())}{of} {self._unit}"

    def _shown(self) -> float:
        """The number of finished items, never more than there are."""
        return self._done if self._total is None else min(self._done, self._total)

    def _per_second(self) -> float:
        seconds = self._clock() - self._began
        return (self._done - self._before) / seconds if seconds > 0 else 0.0

    def _rate(self) -> str:
        """The rate; empty if nothing is done yet, of which none follows."""
        rate = self._per_second()
        for unit, seconds in (("s", 1), ("min", 60), ("h", 3600)):
            if rate * seconds >= 0.1:
                return f"{float(f'{rate * seconds:.3g}'):,.12g}/{unit}"  # 7,610/s
        return ""

    def _left(self) -> str:
        rate = self._per_second()
        if rate <= 0 or self._total is None:
            return "time left unknown"
        return f"{in_words(max(self._total - self._done, 0) / rate)} left"

    def _say(self, *parts: str) -> None:
        stream = sys.stderr if self._stream is None else self._stream
        if stream is not None:
            print(", ".join(filter(None, parts)), file=stream, flush=True)


def counted(items: Iterable[T], what: str, *, total: int, unit: str = "images", active: bool = True) -> Iterator[T]:
    """The items, counted as they are taken."""
    with Counting(what, total=total, unit=unit, active=active) as counting:
        for item in items:
            yield item
            counting.advance()


def in_words(seconds: float) -> str:
    """A span of time in its two largest units: `3 d 4 h`, `5 min`, `12 s`."""
    seconds = int(seconds)
    for size, unit, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // smaller
            return f"{seconds // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{seconds} s"


def _bar(stream: TextIO) -> Any:
    """A bar of which the work's name and the bar itself, not the numbers, get shorter on a narrow terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class What(TextColumn):
        def render(self, task: Task) -> Text:
            return Text(task.description, no_wrap=True, overflow="ellipsis")

    return Progress(
        What("", table_column=Column()),
        BarColumn(table_column=Column()),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
        console=Console(file=stream),
        redirect_stdout=sys.stdout.isatty(),  # else what is printed meanwhile would not reach a file or pipe
    )
