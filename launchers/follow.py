"""Owns what a launcher shows while it waits: rank 0's words as they come, a bar for people, and how the job ended."""

import re
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launchers.outcome import Ending

TAIL_LINES = 20
_STEP = re.compile(r"step (?P<step>\d+)/(?P<total>\d+) +(?P<numbers>.*)")  # as cmscale.training.run_log says it


class Follower:
    """Copies what is added to a log to stdout; goes on to another file when the log's path changes.

    On a terminal the lines that tell a step move a bar instead.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._offset = 0
        self._bar: Progress | None = None

    def show(self, path: Path) -> None:
        """Prints what a log has gained since the last look; another path is shown from its beginning."""
        if path != self._path:
            self._path, self._offset = path, 0
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        self._offset += len(added)
        lines = added.decode(errors="replace")
        if not lines:
            return
        if sys.stdout.isatty():
            for line in lines.splitlines():
                self._show_on_terminal(line)
        else:
            sys.stdout.write(lines)
            sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_on_terminal(self, line: str) -> None:
        found = _STEP.fullmatch(line.strip())
        if found is None:
            (self._bar.console.print if self._bar else print)(line)
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
            self._bar.add_task("training", total=int(found["total"]))
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=int(found["step"]), description=found["numbers"])


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, read from its end."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def show_end(ending: Ending, why: str, *, log: Path | None) -> int:
    """Says how a job ended. Returns the launcher's exit status: 0, 2 for a user's mistake, 1 for the rest."""
    match ending:
        case "finished":
            return 0
        case "user_error":
            print(f"error: {why}", file=sys.stderr, flush=True)
            return 2
        case "fault":
            shown = tail(log) if log else ""
            if shown:
                print(f"--- the end of {log}\n{shown}\n---", file=sys.stderr)
            print(f"fault: {why}" + (f" (log: {log})" if log else ""), file=sys.stderr, flush=True)
            return 1
        case _:
            print(f"stopped: {why}", file=sys.stderr, flush=True)
            return 1
