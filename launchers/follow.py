"""Shows a job's progress to the user who waits for it: rank 0's log, a progress bar, and how the job ended."""

import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from cmscale.io.remarks import say
from launchers.judge import Ending

TAIL_LINES = 20
_STEP = re.compile(r"step (?P<step>\d+)/(?P<total>\d+) +(?P<numbers>.*)")  # cmscale.training.run_log prints it
_ENDS = ("error: ", "finished, not exported: ")  # as a rank and `show_end` print it


class Follower:
    """Copies new lines of a log to stdout; on a terminal, lines with a step advance a progress bar instead.

    Attributes:
        told: The last lines that a terminal has been shown, if they say why the job ends.
    """

    def __init__(self) -> None:
        self.told: list[str] = []
        self._path: Path | None = None
        self._offset = 0
        self._begun = b""  # of a line whose end is not written yet
        self._bar: Progress | None = None
        self._is_cut = False

    def show(self, path: Path) -> None:
        """Prints the lines that were added to a log since the last call; another log is shown from its beginning."""
        if path != self._path:
            self._show_begun()
            self._path, self._offset = path, 0
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        self._offset += len(added)
        whole, end, self._begun = (self._begun + added).rpartition(b"\n")
        self._show((whole + end).decode(errors="replace"))

    def _show_begun(self) -> None:
        """Prints the beginning of a line that will have no end of its own."""
        if self._begun:
            self._show(self._begun.decode(errors="replace") + "\n")
        self._begun = b""

    def _show(self, lines: str) -> None:
        if not lines:
            return
        if sys.stdout.isatty():
            for line in lines.splitlines():
                self._show_on_terminal(line)
        elif (error := say(lines, end="")) and not self._is_cut:  # the job goes on without an onlooker
            self._is_cut = True
            say(f"note: standard output: {error.strerror}; all lines are in {self._path}", to="stderr")

    def close(self) -> None:
        """Prints what is left, and ends the progress bar."""
        self._show_begun()
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()
            self._bar = None

    def _show_on_terminal(self, line: str) -> None:
        if line.startswith(_ENDS):
            self.told.append(line)
        else:
            self.told.clear()
        found = _STEP.fullmatch(line.strip())
        if found is None:
            (self._bar.console.print if self._bar else print)(line)
            return
        if self._bar is None:
            # On a narrow terminal the bar gets shorter, not the numbers; the line itself says how long it still takes.
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(table_column=Column()),
                TextColumn("{task.description}", markup=False),
            )
            self._bar.add_task("", total=int(found["total"]))
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=int(found["step"]), description=found["numbers"])


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; empty if there is none. At most its last 64 KiB are read."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def show_end(ending: Ending, why: str, *, log: Path | None, told: Sequence[str] = ()) -> int:
    """Prints how a job ended, with the end of its log after a fault.

    Args:
        told: What a `Follower` has told the terminal of it already, which is not told twice.

    Returns:
        The launcher's exit status: 0 if it finished, 2 after a user's mistake, else 1.
    """
    match ending:
        case "finished":
            return 0
        case "user_error" | "no_space":
            _say_once(f"error: {why}", told)
            return 2 if ending == "user_error" else 1
        case "fault":
            shown = tail(log) if log else ""
            if shown:
                say(f"--- the end of {log}\n{shown}\n---", to="stderr")
            say(f"fault: {why}" + (f" (log: {log})" if log else ""), to="stderr")
            return 1
        case "not_exported":
            _say_once(f"finished, not exported: {why}", told)
            return 1
        case "preempted" | "time_limit" | "cancelled" | "superseded":
            say(f"stopped: {why}", to="stderr")
            return 1
        case _:
            assert_never(ending)


def _say_once(line: str, told: Sequence[str]) -> None:
    """Prints a line on stderr, unless its terminal shows it already. Ranks print several mistakes in a line each."""
    first, *others = told or [""]
    if "; ".join([first, *(each.removeprefix("error: ") for each in others)]) != line or not sys.stderr.isatty():
        say(line, to="stderr")
