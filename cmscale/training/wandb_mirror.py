"""Logs metrics to metrics.jsonl and to wandb, so that no failure of wandb can stop or delay training."""

import contextlib
import os
import queue
import secrets
import threading
from pathlib import Path
from typing import Any

from cmscale.config import Wandb
from cmscale.errors import UserError
from cmscale.io.durable import sync_file
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, write_event


class MetricsLog:
    """Writes the metrics of rank 0 to metrics.jsonl and to wandb; on other ranks (`active` False) it does nothing."""

    def __init__(self, run: RunDir, wandb: Wandb, *, config: dict[str, Any], active: bool) -> None:
        self._run = run
        self._active = active
        self._unwritten: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._mirror = WandbMirror(run, wandb, config=config) if active and wandb.mode != "off" else None

    def write(self, record: dict[str, Any]) -> None:
        """Logs the metrics of the applied step `record["step"]`.

        What can't be written now (a full disk) is written with the next record, or by `sync`.
        """
        if not self._active:
            return
        with self._lock:
            self._unwritten.append(record)
            try:
                self._append()
            except (OSError, UserError) as error:
                print(f"metrics of step {record['step']} are not written yet: {error}", flush=True)
        if self._mirror is not None:
            self._mirror.write(record)

    def sync(self) -> None:
        """Makes all metrics so far durable. Any thread may call it.

        Raises:
            OSError, UserError: they can't be written.
        """
        if not self._active:
            return
        with self._lock:
            self._append()
            if self._run.metrics.exists():
                sync_file(self._run.metrics)

    def _append(self) -> None:
        while self._unwritten:
            append_line(self._run.metrics, self._unwritten[0])
            del self._unwritten[0]

    def close(self) -> None:
        """Closes the wandb run; waits at most a few seconds."""
        if self._unwritten:
            print(f"{self._run.metrics}: the last {len(self._unwritten)} records are lost", flush=True)
        if self._mirror is not None:
            self._mirror.close()


class WandbMirror:
    """Logs to wandb in a separate thread, so that training never waits for it or sees its errors.

    The wandb id is stored in the run's folder, so that a resumed run continues its wandb run. `step` is a metric of its
    own (`define_metric`), as wandb drops records with a step below its last one.
    """

    def __init__(self, run: RunDir, wandb: Wandb, *, config: dict[str, Any]) -> None:
        self._run = run
        self._settings = wandb
        self._config = config
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=10_000)
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Queues a record; it is dropped if the queue is full because wandb can't be reached."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(record)

    def close(self, patience: float = 10.0) -> None:
        """Closes the wandb run, without waiting longer than `patience` seconds."""
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
