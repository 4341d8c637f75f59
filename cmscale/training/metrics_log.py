"""Logs metrics to metrics.jsonl, and to the mirrors that the config asks for."""

import threading
from collections.abc import Callable
from typing import Any

from cmscale.config import Config, Prometheus, Tensorboard, Wandb
from cmscale.errors import UserError
from cmscale.io.durable import sync_file
from cmscale.io.remarks import say
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line
from cmscale.training.mirror import Mirror
from cmscale.training.prometheus_file import PrometheusFile
from cmscale.training.tensorboard_mirror import TensorboardMirror
from cmscale.training.wandb_mirror import WandbMirror


class MetricsLog:
    """Writes the metrics of rank 0 to metrics.jsonl and to mirrors; on other ranks (`active` False) it does nothing.

    Args:
        leaving: Whether the training was asked to stop.
    """

    def __init__(
        self,
        run: RunDir,
        wandb: Wandb,
        *,
        config: dict[str, Any],
        active: bool,
        tensorboard: Tensorboard = Tensorboard(),  # noqa: B008
        prometheus: Prometheus = Prometheus(),  # noqa: B008
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._run = run
        self._active = active
        self._unwritten: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._mirrors: list[Mirror] = []
        if active:
            self._mirrors = open_mirrors(run, wandb, tensorboard, prometheus, config=config)
        for mirror in self._mirrors:
            mirror.leaving = leaving

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
                say(f"metrics of step {record['step']} are not written yet: {error}")
        for mirror in self._mirrors:
            mirror.look()

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
        """Closes the mirrors; waits at most a few seconds for each."""
        if self._unwritten:
            say(f"{self._run.metrics}: the last {len(self._unwritten)} records are lost")
        for mirror in self._mirrors:
            mirror.close()


def open_mirrors(
    run: RunDir,
    wandb: Wandb,
    tensorboard: Tensorboard,
    prometheus: Prometheus,
    *,
    config: dict[str, Any],
    only_news: bool = False,
) -> list[Mirror]:
    """Starts the mirrors of a run that its config asks for; with `only_news` those that have all open nothing."""
    mirrors: list[Mirror] = []
    if wandb.mode != "off":
        mirrors.append(WandbMirror(run, wandb, config=config, only_news=only_news))
    if tensorboard.enabled:
        mirrors.append(TensorboardMirror(run, only_news=only_news))
    if prometheus.enabled:
        total = config.get("train", {}).get("total_steps", 0)
        mirrors.append(PrometheusFile(run, prometheus, total_steps=total))
    return mirrors


def send(run: RunDir, config: Config) -> dict[str, str]:
    """Sends what the mirrors of a run that has ended do not have yet.

    Returns:
        By name why a mirror failed; empty for those that have all.
    """
    mirrors = open_mirrors(
        run,
        config.wandb,
        config.tensorboard,
        config.prometheus,
        config=config.model_dump(mode="json"),
        only_news=True,
    )
    for mirror in mirrors:
        mirror.close(patience=threading.TIMEOUT_MAX)
    return {mirror.name: mirror.failure for mirror in mirrors}
