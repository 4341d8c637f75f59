"""Owns a run's own words: metrics.jsonl and events.jsonl first, wandb as a mirror that can't fail a run."""

import contextlib
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmscale.config import Wandb
from cmscale.rundir import RunDir
from cmscale.storage import explained


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


class MetricsLog:
    """Writes metrics of rank 0 to metrics.jsonl and mirrors them to wandb. Other ranks' logs do nothing."""

    def __init__(self, run: RunDir, wandb: Wandb, *, config: dict[str, Any], active: bool) -> None:
        self._run = run
        self._active = active
        self._mirror = WandbMirror(run, wandb, config=config) if active and wandb.mode != "off" else None

    def write(self, record: dict[str, Any]) -> None:
        """Logs one step's numbers; `record["step"]` is the applied step they belong to."""
        if not self._active:
            return
        append_line(self._run.metrics, record)
        if self._mirror is not None:
            self._mirror.write(record)

    def close(self) -> None:
        """Ends the mirror, waiting a few seconds at the most."""
        if self._mirror is not None:
            self._mirror.close()


class WandbMirror:
    """wandb in a thread of its own: nothing it does, raises or waits for reaches training.

    The run's id is kept beside the run, so that every resumption is the same wandb run. Steps are our own
    (`define_metric`), because wandb drops what is logged at a step it has passed.
    """

    def __init__(self, run: RunDir, wandb: Wandb, *, config: dict[str, Any]) -> None:
        self._run = run
        self._settings = wandb
        self._config = config
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=10_000)
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Hands a record over; a full queue (wandb away for long) drops it, metrics.jsonl has it."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(record)

    def close(self, patience: float = 10.0) -> None:
        """Asks wandb to end and leaves it behind after `patience` seconds."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(patience)

    def _mode(self) -> str:
        if self._settings.mode != "auto":
            return self._settings.mode
        has_key = bool(os.environ.get("WANDB_API_KEY")) or ".wandb.ai" in _netrc()
        return "online" if has_key else "offline"

    def _work(self) -> None:
        try:
            import wandb

            mirror = wandb.init(
                project=self._settings.project,
                entity=self._settings.entity,
                name=self._run.name,
                id=self._identity(),
                resume="allow",
                mode=self._mode(),  # pyright: ignore[reportArgumentType]
                dir=str(self._run.root),
                config=self._config,
                settings=wandb.Settings(init_timeout=60, silent=True, console="off"),
            )
            mirror.define_metric("step")
            mirror.define_metric("*", step_metric="step")
            while (record := self._queue.get()) is not None:
                mirror.log(record)
            mirror.finish()
        except Exception as error:
            write_event(self._run, "wandb_failed", step=-1, rank=0, why=f"{type(error).__name__}: {error}")

    def _identity(self) -> str:
        if not self._run.wandb_id.exists():
            self._run.wandb_id.write_text(secrets.token_hex(8))
        return self._run.wandb_id.read_text().strip()


def _netrc() -> str:
    with contextlib.suppress(OSError):
        return (Path.home() / ".netrc").read_text()
    return ""
