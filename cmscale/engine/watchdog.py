"""Owns the watch over a rank: a process of its own that ends the rank when no step comes within the limit."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

from cmscale.config import Config
from cmscale.distributed.world import World
from cmscale.runs.folder import RunDir

WATCH = Path(__file__).with_name("watch.py")


class Watchdog:
    """Watches this process from outside, so that a held GIL, a stuck collective and SIGSTOP are all seen.

    Past the limit the stacks of all threads go to `logs/stacks-rank-N.txt`, the rank and step to
    events.jsonl, and this
    process is killed; the launcher then ends the job. The watch ends by itself with this process.
    """

    def __init__(self, run: RunDir, config: Config, world: World) -> None:
        run.logs.mkdir(parents=True, exist_ok=True)
        self._stacks = (run.logs / f"stacks-rank-{world.rank}.txt").open("a")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        limit = 60.0 * config.engine.step_timeout_minutes
        arguments = [str(os.getpid()), str(limit), str(world.rank), str(run.events), self._stacks.name]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WATCH), *arguments],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)  # a watch that hangs must not hold the rank

    @property
    def pid(self) -> int:
        """The watching process."""
        return self._process.pid

    def beat(self, step: int) -> None:
        """Says that the rank lives, at a step; starts the limit anew."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, step.to_bytes(8, "little", signed=True))

    def stop(self) -> None:
        """Ends the watch."""
        self._process.kill()  # closing the pipe would not do: forked data workers hold it too
        self._process.wait()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
