"""Watches a rank from a second process, which kills the rank if no step ends within the limit."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

from cmscale.config import Config
from cmscale.distributed.world import World
from cmscale.io.process import START
from cmscale.runs.folder import RunDir

WATCH = Path(__file__).with_name("watch.py")


class Watchdog:
    """Watches this process from outside, so that it notices a held GIL, a stuck collective and SIGSTOP alike.

    Past the limit it writes the stacks of all threads to `logs/stacks-rank-N.txt` and a `fault` with rank and step to
    events.jsonl, and kills this process; the launcher then ends the job. The watch itself ends with this process.
    """

    def __init__(self, run: RunDir, config: Config, world: World) -> None:
        run.logs.mkdir(parents=True, exist_ok=True)
        self._stacks = (run.logs / f"stacks-rank-{world.rank}.txt").open("a")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        limit = 60.0 * config.engine.step_timeout_minutes
        arguments = [str(os.getpid()), str(limit), str(world.rank), str(run.events), self._stacks.name]
        arguments.append(os.environ.get(START, ""))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WATCH), *arguments],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)  # a watch that hangs must not block the rank

    @property
    def pid(self) -> int:
        """The process id of the watch."""
        return self._process.pid

    def beat(self, step: int) -> None:
        """Reports that the rank is at a step; the limit starts again."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, step.to_bytes(8, "little", signed=True))

    def stop(self) -> None:
        """Stops the watch."""
        self._process.kill()  # closing the pipe is not enough: forked data workers have it too
        self._process.wait()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
