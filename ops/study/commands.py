"""Runs the study's commands one after the other, each once: what is done is recorded, and is not done again."""

import contextlib
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from study.plan import CHECKOUT, Command

from cmscale.errors import UserError
from cmscale.io.process import die_with_parent
from cmscale.runs.log import append_line, read_lines
from cmscale.runs.results import utc_now

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Keep freed memory in the process: glibc otherwise returns it to the kernel after every layer, which zeroes it
    # again for the next one.
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
POLL_SECONDS = 0.2
GRACE_SECONDS = 180.0
"""How long a start waits for a command of a killed start, which saves and ends by itself."""


@dataclass
class Runner:
    """Runs commands in a study's folder, and keeps a record of them.

    Attributes:
        deadline: When, by the monotonic clock, the running command is asked to save and end; None for never.
        stopped: The signal that ended the study.
    """

    out: Path
    deadline: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    stopped: int | None = None
    _process: subprocess.Popen[bytes] | None = None

    @property
    def record(self) -> Path:
        """A line for every command that ended: name, status, seconds."""
        return self.out / "commands.jsonl"

    def done(self) -> set[str]:
        """The names of the commands that ended well."""
        return {str(line["name"]) for line in read_lines(self.record) if line.get("status") == 0}

    def is_done(self, command: Command) -> bool:
        return command.name in self.done() and command.product.exists()

    @property
    def is_over(self) -> bool:
        """Whether no further command may begin."""
        return self.stopped is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    def run_all(self, commands: Iterable[Command], *, count: int) -> list[str]:
        """Runs the commands that are not done yet. One that fails does not keep others from running.

        Returns:
            The names of those that failed or could not begin.
        """
        failed: list[str] = []
        with self._after_others() as lock, self._ending_in_order():
            for number, command in enumerate(commands, start=1):
                if self.is_over:
                    break
                if self.is_done(command):
                    continue
                if lacking := [name for name in command.needs if name in failed]:
                    print(f"{command.name}: left out, as {lacking[0]} failed", file=sys.stderr, flush=True)
                    failed.append(command.name)
                    continue
                print(f"[{number}/{count}] {command.name}", flush=True)
                status = self._run(command, lock)
                if status and not self.is_over:
                    print(f"{command.name}: failed with status {status}: see {self._log(command)}", file=sys.stderr)
                    failed.append(command.name)
        return failed

    def _run(self, command: Command, lock: int) -> int:
        """Runs a command to its end, or until the deadline or a signal. Returns its exit status."""
        began, used = time.monotonic(), _processor_seconds()
        if command.leftover is not None:
            shutil.rmtree(command.leftover, ignore_errors=True)
        log = self._log(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(CHECKOUT), **self.environment}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command.arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C reaches the study alone, which ends the command in order
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # however the study ends, the command saves
            )
        if self.stopped is not None:  # it came before there was a process to pass it to
            self._process.terminate()
        while not self.is_over and self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(POLL_SECONDS)
        if self.stopped is None:  # a signal's handler does it otherwise
            self._process.terminate()  # nothing happens if it has ended
        status = self._process.wait()
        seconds, cpu = time.monotonic() - began, _processor_seconds() - used
        line = {"name": command.name, "status": status, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
        append_line(self.record, {**line, "date": utc_now()}, durable=True)
        return status

    def _log(self, command: Command) -> Path:
        return self.out / "logs" / f"{command.name.replace(' ', '-')}.log"

    @contextlib.contextmanager
    def _after_others(self) -> Iterator[int]:
        """A lock that every command inherits: a start waits for what a killed start left running."""
        path = self.out / ".command.lock"
        with path.open("ab") as file:
            until = time.monotonic() + GRACE_SECONDS
            said = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not said:
                        print("waiting for a command of an earlier start, which saves and ends", flush=True)
                        said = True
                    if time.monotonic() > until:
                        raise UserError(f"a command of an earlier start still runs: `fuser {path}` shows it") from None
                    time.sleep(0.1)
            yield file.fileno()

    @contextlib.contextmanager
    def _ending_in_order(self) -> Iterator[None]:
        """While the block runs, Ctrl-C and SIGTERM ask the command to save and end; a second one kills it."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        again, self.stopped = self.stopped is not None, number
        if self._process is None or self._process.poll() is not None:
            return
        if again:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.terminate()
            print("stopping: the command saves and ends; repeat to end it at once", file=sys.stderr, flush=True)


def _processor_seconds() -> float:
    """What all commands so far have used on the processors, with the processes that they started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
