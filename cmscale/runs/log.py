"""Owns a run's own words: metrics.jsonl and events.jsonl first, wandb as a mirror that can't fail a run."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmscale.io.storage import explained
from cmscale.runs.folder import RunDir


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line in a single write, so that lines of several processes never mix."""
    line = (json.dumps(record, allow_nan=True) + "\n").encode()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a crash; its record is lost, not ours
            os.write(descriptor, b"\n" + line if torn else line)
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; a last line cut by a crash is passed over."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def is_of_evaluation(event: str) -> bool:
    """Whether an event tells of an evaluation, which stands beside the training and says nothing of its end."""
    return event == "evaluated" or event.startswith("evaluation_")


def write_event(run: RunDir, event: str, *, step: int, rank: int, why: str = "", **more: Any) -> None:
    """One line in events.jsonl: start, checkpoint, preempted, requeued, resumed, fault, finished, ..."""
    append_line(run.events, {"time": time.time(), "event": event, "step": step, "rank": rank, "why": why, **more})


def latest_metrics(run: RunDir) -> list[dict[str, Any]]:
    """metrics.jsonl with what was replayed after a resume counted once: the last line of each step, by step."""
    by_step = {record["step"]: record for record in read_lines(run.metrics)}
    return [by_step[step] for step in sorted(by_step)]
