"""Real training, slowed down so that a cluster has time to do to it what it likes."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmscale.engine import checkpoint
from cmscale.io.process import EARLY_SIGNAL
from cmscale.runs.folder import RunDir
from cmscale.training import loop as train

AT_THE_START = -1


def stay(run_dir: str, places: tuple[int, ...]) -> str:
    """Real training whose last rank stays, once before the step after each of `places`, until asked to leave.

    The others wait for it in the middle of that step. `AT_THE_START` is before the rank has met the others. Where it
    stays for the n-th time it says so, with its process id, in `staying-N`.
    """
    run, last = RunDir(Path(run_dir)), os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    number = len(list(run.root.glob("staying-*")))  # only one rank's
    to_come = list(places[number:]) if last else []
    install, installed = train.Preemption.install, []
    train.Preemption.install = lambda: installed.append(install()) or installed[0]

    def wait_here(asked: Callable[[], bool]) -> None:
        to_come.pop(0)
        (run.root / f"staying-{len(places) - len(to_come)}").write_text(str(os.getpid()))
        until = time.monotonic() + 200
        while not asked() and time.monotonic() < until:
            time.sleep(0.05)

    if to_come[:1] == [AT_THE_START]:
        wait_here(lambda: EARLY_SIGNAL in os.environ)
    else:
        before_every_step(lambda step: wait_here(lambda: installed[0].flagged) if to_come[:1] == [step] else None)
    return train.main(run_dir)


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


def die_on_one_node(run_dir: str) -> str:
    """Real training that dies before the step after 4 on the node where it first came to it."""
    marker = Path(run_dir) / "bad-node"

    def die(step: int) -> None:
        if step == 4:
            if not marker.exists():
                marker.write_text(os.environ["SLURMD_NODENAME"])
            if marker.read_text() == os.environ["SLURMD_NODENAME"]:
                os.kill(os.getpid(), signal.SIGKILL)

    before_every_step(die)
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
