"""Real training, slowed down so that a cluster has time to do to it what it likes."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmscale import train
from cmscale.engine import checkpoint
from cmscale.rundir import RunDir
from launchers.job import EARLY_SIGNAL

AT_THE_START = -1


def stay(run_dir: str, places: tuple[int, ...]) -> str:
    """Real training whose last rank stays, in its n-th start, before the step after `places[n]` until asked to leave.

    The others wait for it in the middle of that step. `AT_THE_START` is before the rank has met the others. Where it
    stays, it says so with its process id in `staying-N`.
    """
    run, last = RunDir(Path(run_dir)), os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    start = checkpoint.read_generation(run) + 1  # nobody takes the next number before all ranks have met
    place = places[start - 1] if last and start <= len(places) else None
    if place == AT_THE_START:
        wait_for(lambda: EARLY_SIGNAL in os.environ, run, start)
    elif place is not None:
        install, installed = train.Preemption.install, []
        train.Preemption.install = lambda: installed.append(install()) or installed[0]
        before_every_step(lambda step: wait_for(lambda: installed[0].flagged, run, start) if step == place else None)
    return train.main(run_dir)


def wait_for(condition: Callable[[], bool], run: RunDir, start: int) -> None:
    (run.root / f"staying-{start}").write_text(str(os.getpid()))
    until = time.monotonic() + 200
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)


def eat_all_memory(run_dir: str, starts: int) -> str:
    """Real training whose last rank takes 3 GiB before the step after 4, in its first `starts` starts."""
    run, last = RunDir(Path(run_dir)), os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def eat(step: int) -> None:
        if step == 4 and last and checkpoint.read_generation(run) <= starts:
            eaten = bytearray(b"x") * (3 * 2**30)
            time.sleep(60)
            assert eaten

    before_every_step(eat)
    return train.main(run_dir)


def wait_for_another_start(run_dir: str) -> str:
    """Real training that, in the first start, stays before step 4 until the run was started again."""
    run = RunDir(Path(run_dir))
    until = time.monotonic() + 200

    def wait(step: int) -> None:
        while step == 4 and checkpoint.read_generation(run) == 1 and time.monotonic() < until:
            time.sleep(0.05)

    before_every_step(wait)
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
