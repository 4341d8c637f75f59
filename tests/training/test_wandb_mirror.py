"""Tests that training survives failures of wandb in the middle and at the end of a run."""

import threading
import time
from pathlib import Path

import pytest
import wandb

from cmscale.config import Wandb
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from cmscale.training.wandb_mirror import MetricsLog, WandbMirror


class Server:
    """A wandb run that fails as configured: in `log` from a step on, or by blocking in `finish`."""

    def __init__(self, *, breaks_at: int = 10**9, hangs_at_the_end: bool = False) -> None:
        self.breaks_at = breaks_at
        self.hangs_at_the_end = hangs_at_the_end
        self.steps: list[int] = []
        self.reached = threading.Event()
        self.released = threading.Event()

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, record: dict) -> None:
        if record["step"] >= self.breaks_at:
            raise ConnectionError("wandb went away")
        self.steps.append(record["step"])

    def finish(self) -> None:
        self.reached.set()
        if self.hangs_at_the_end:
            self.released.wait(60)


def log_to(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> MetricsLog:
    monkeypatch.setattr(wandb, "init", lambda **_: server)
    return MetricsLog(RunDir(folder), Wandb(mode="offline"), config={}, active=True)


def test_wandb_that_goes_away_in_the_middle_costs_nothing_but_its_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(breaks_at=3)
    log = log_to(server, tmp_path, monkeypatch)
    for step in range(1, 6):
        log.write({"step": step})
    log.close()
    assert server.steps == [1, 2]
    assert [record["step"] for record in read_lines(RunDir(tmp_path).metrics)] == [1, 2, 3, 4, 5]
    assert [record["event"] for record in read_lines(RunDir(tmp_path).events)] == ["wandb_failed"]


def test_wandb_that_hangs_at_the_end_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(hangs_at_the_end=True)
    monkeypatch.setattr(wandb, "init", lambda **_: server)
    mirror = WandbMirror(RunDir(tmp_path), Wandb(mode="offline"), config={})
    mirror.write({"step": 1})
    began = time.monotonic()
    mirror.close(patience=0.2)
    assert time.monotonic() - began < 30
    assert server.reached.wait(30)
    assert server.steps == [1]
    server.released.set()
