"""Owns what a rank does in the tests of whole runs: train a run folder, ended by a signal where the test says so."""

import json
import os
import signal
import threading
import time
from pathlib import Path

from cmscale import train
from cmscale.metrics_log import read_lines
from cmscale.rundir import RunDir


def to_the_end(run_dir: str) -> None:
    """Trains, and prints how it ended."""
    print(json.dumps(train.main(run_dir)))


def until_signalled(run_dir: str, step: int, number: int) -> None:
    """Trains, and on rank 0 sends itself signal `number` once `step` is logged."""
    if os.environ["RANK"] == "0":
        threading.Thread(target=_signal_at, args=(RunDir(Path(run_dir)), step, number), daemon=True).start()
    to_the_end(run_dir)


def _signal_at(run: RunDir, step: int, number: int) -> None:
    while not any(record["step"] >= step for record in read_lines(run.metrics)):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.Signals(number))
