"""Real training, slowed down so that a cluster has time to do to it what it likes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmscale import train
from cmscale.engine import checkpoint
from cmscale.rundir import RunDir


def wait_for_another_start(run_dir: str) -> str:
    """Real training that, in the first start, stays before step 4 until the run was started again."""
    run = RunDir(Path(run_dir))
    until = time.monotonic() + 200

    def stay(step: int) -> None:
        while step == 4 and checkpoint.read_generation(run) == 1 and time.monotonic() < until:
            time.sleep(0.05)

    before_every_step(stay)
    return train.main(run_dir)


def save_slowly_once(run_dir: str) -> str:
    """Real training whose save of step 5 takes longer, in the first start, than any grace."""
    marker, write = Path(run_dir) / "slow", checkpoint.save_file

    def save_file(tensors: Any, path: Path) -> None:
        write(tensors, path)
        if "step-000000005" in str(path) and not marker.exists():
            marker.touch()
            time.sleep(120)

    checkpoint.save_file = save_file
    before_every_step(lambda step: time.sleep(0.1))
    return train.main(run_dir)


def before_every_step(action: Callable[[int], None]) -> None:
    original = train.Parts.step

    def acting(self: train.Parts, batch: Any, point: Any) -> Any:
        action(point.step)
        return original(self, batch, point)

    train.Parts.step = acting
