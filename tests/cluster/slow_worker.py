"""Workers that train for real, with pauses at chosen steps, so that tests can do something to the job there."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmscale.engine import staged
from cmscale.engine.preemption import Preemption
from cmscale.io.process import EARLY_SIGNAL
from cmscale.runs.folder import RunDir
from cmscale.runs.generations import read_generation
from cmscale.training import assemble, loop

AT_THE_START = -1


def stay(run_dir: str, places: list[int]) -> str:
    """Trains; the last rank waits once before the step after each of `places` until it is asked to leave.

    Meanwhile the other ranks wait for it within that step. `AT_THE_START` is before the rank has met the others. At
    its n-th wait the rank writes its process id to the file `staying-N`.
    """
    run, last = RunDir(Path(run_dir)), os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    number = len(list(run.root.glob("staying-*")))  # only one rank writes these files
    to_come = list(places[number:]) if last else []
    installed = noted_preemption()

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
    return loop.main(run_dir)


def pause(run_dir: str, places: list[int]) -> str:
    """Trains; rank 0 waits before the step after each of `places` for a file `go-on-STEP`, or until it must leave."""
    run, installed = RunDir(Path(run_dir)), noted_preemption()

    def wait_here(step: int) -> None:
        until = time.monotonic() + 200
        (run.root / f"paused-{step}").touch()
        while not (run.root / f"go-on-{step}").exists() and not installed[0].flagged and time.monotonic() < until:
            time.sleep(0.05)

    if os.environ["RANK"] == "0":
        before_every_step(lambda step: wait_here(step) if step in places else None)
    return loop.main(run_dir)


def eat_all_memory(run_dir: str, starts: int) -> str:
    """Trains; the last rank allocates 3 GiB before the step after 4, in the first `starts` starts."""
    run, last = RunDir(Path(run_dir)), os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def eat(step: int) -> None:
        if step == 4 and last and read_generation(run) <= starts:
            eaten = bytearray(b"x") * (3 * 2**30)
            time.sleep(60)
            assert eaten

    before_every_step(eat)
    return loop.main(run_dir)


def die_on_one_node(run_dir: str) -> str:
    """Trains; dies before the step after 4 on the node that first reached it."""
    marker = Path(run_dir) / "bad-node"

    def die(step: int) -> None:
        if step == 4:
            if not marker.exists():
                marker.write_text(os.environ["SLURMD_NODENAME"])
            if marker.read_text() == os.environ["SLURMD_NODENAME"]:
                os.kill(os.getpid(), signal.SIGKILL)

    before_every_step(die)
    return loop.main(run_dir)


def wait_for_another_start(run_dir: str) -> str:
    """Trains; the first start waits before the step after 4 until the run was started again."""
    run = RunDir(Path(run_dir))
    until = time.monotonic() + 200

    def wait(step: int) -> None:
        while step == 4 and read_generation(run) == 1 and time.monotonic() < until:
            time.sleep(0.05)

    before_every_step(wait)
    return loop.main(run_dir)


def save_slowly_once(run_dir: str) -> str:
    """Trains; in the first start the save of step 5 takes longer than any grace."""
    marker, write = Path(run_dir) / "slow", staged.save_file

    def save_file(tensors: Any, path: Path) -> None:
        write(tensors, path)
        if "step-000000005" in str(path) and not marker.exists():
            marker.touch()
            time.sleep(120)

    staged.save_file = save_file
    before_every_step(lambda step: time.sleep(0.1))
    return loop.main(run_dir)


def noted_preemption() -> list[Preemption]:
    """A list that gets the loop's record of requests to leave."""
    install, installed = loop.Preemption.install, []
    loop.Preemption.install = lambda: installed.append(install()) or installed[0]
    return installed


def before_every_step(action: Callable[[int], None]) -> None:
    """Calls `action` with the number of applied steps before every step."""
    original = assemble.Parts.step

    def acting(self: assemble.Parts, batch: Any, values: Any) -> Any:
        action(values.step)
        return original(self, batch, values)

    assemble.Parts.step = acting
