"""Reads and writes a run's logs: metrics.jsonl and events.jsonl, one JSON record per line."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cmscale.io.durable import explained, gone, sync_folder
from cmscale.io.json_text import parse_json
from cmscale.runs.append import append
from cmscale.runs.folder import RunDir

_READ_AT_ONCE = 1 << 20


def append_line(path: Path, record: dict[str, Any], *, durable: bool = False) -> None:
    """Appends one JSON line to `path`, in a folder that is there: that of a run that was moved is not made anew.

    Args:
        durable: Returns only when the line is on the disk, with the file's name if this call made the file.

    Raises:
        UserError: the file cannot be written, or its folder is gone.
    """
    with explained(path):
        if not path.parent.is_dir():
            raise gone(path.parent)
        is_new = not path.exists()
        append(path, record, durable=durable)
        if durable and is_new:
            sync_folder(path.parent)


def read_lines(path: Path, *, count: Callable[[int], None] = lambda _: None) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, none if there is no such file; what a crash left of a line is skipped.

    Args:
        count: Is told now and then how many bytes more have been read.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        while lines := file.readlines(_READ_AT_ONCE):
            for line in lines:
                with contextlib.suppress(ValueError):  # also where zeros or other bytes are that no one wrote
                    if isinstance(record := parse_json(line), dict):
                        yield record
            count(sum(map(len, lines)))


def is_beside_training(event: str) -> bool:
    """Whether an event is an evaluation's, or of samples: those jobs say nothing about the end of the training."""
    return event == "evaluated" or event.startswith(("evaluation_", "sampling_"))


_BEGIN_AT = ("start", "resumed", "checkpoint")
_CLOCKS_DIFFER_SECONDS = 1.0  # that of a file system from the machine's, at least: it may stand still for some ms
_COPIED_LATER_SECONDS = 60.0
_STATES = {"not_exported": "finished, not exported"}


def state_of(events: Iterable[dict[str, Any]]) -> str:
    """How a run stands, for users: its last event, but for those of evaluations, copies, storage and older starts."""
    last = ""
    for record in events:
        event = str(record.get("event", ""))
        is_copy = event.startswith(("export", "storage_")) or event.endswith("_failed")  # mirrors: wandb_failed
        if not (is_beside_training(event) or is_copy or event == "superseded"):
            last = event
    return _STATES.get(last, last) or "never started"


def step_now(run: RunDir, events: Sequence[dict[str, Any]], *, logged: int) -> int:
    """The step where a run is: by its events since it began, resumed or rolled back, and its metrics since then.

    Args:
        logged: The step of the newest record of its metrics.
    """
    found = [0]
    backwards = (each for each in reversed(events) if not is_beside_training(str(each.get("event", ""))))
    for event in backwards:
        name, step = event.get("event"), event.get("step")
        if type(step) is int and name != "rolled_back":  # from that step
            found.append(step)
        if name in ("start", "resumed", "rolled_back"):
            if _has_logged_since(run, event.get("time")):
                break
            if name == "rolled_back":  # to the last checkpoint
                step = next((each.get("step") for each in backwards if each.get("event") in _BEGIN_AT), 0)
                found.append(step if type(step) is int else 0)
            return max(found)
    return max(*found, logged)


def _has_logged_since(run: RunDir, moment: Any) -> bool:
    """Whether the metrics of a run were written after a moment, as far as can be told."""
    with contextlib.suppress(OSError, TypeError):
        return run.metrics.stat().st_mtime >= moment - _CLOCKS_DIFFER_SECONDS
    return True


def measured_until(run: RunDir) -> float | None:
    """When the newest metrics were written, in seconds since 1970; None if there are none.

    Also None in a copy of a run whose files have the time of copying: then the events are older than their file.
    """
    with contextlib.suppress(OSError):
        newest = max((each["time"] for each in read_lines(run.events) if type(each.get("time")) is float), default=0.0)
        if run.events.stat().st_mtime - newest < _COPIED_LATER_SECONDS:
            return run.metrics.stat().st_mtime
    return None


def write_event(run: RunDir, event: str, *, step: int, rank: int, why: str = "", **more: Any) -> None:
    """Appends one line to events.jsonl, durably: start, checkpoint, preempted, resumed, fault, finished, ..."""
    record = {"time": time.time(), "event": event, "step": step, "rank": rank, "why": why, **more}
    append_line(run.events, record, durable=True)


def latest_metrics(run: RunDir) -> list[dict[str, Any]]:
    """The records of metrics.jsonl by step, of each step the last: those replayed after a resume count once."""
    by_step = {record["step"]: record for record in read_lines(run.metrics) if isinstance(record.get("step"), int)}
    return [by_step[step] for step in sorted(by_step)]
