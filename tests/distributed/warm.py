"""Forks test ranks from one process that has made the slow imports: a rank starts in a fraction of a second.

Run as a program it is that process: it reads a request per line, forks, answers with the process id, and writes the
exit status of each rank into a file when it ends. The launcher's own way of starting ranks is tested in
`tests/launchers` and by the tests that call `small_runs.launch`.
"""

import atexit
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

SLOW_IMPORTS = (
    "deepspeed",
    "torch._dynamo",  # every optimizer of torch imports it when it is made
    "cmscale.evaluation.evaluate",
    "cmscale.training.loop",
)


class Forked:
    """A rank that the warm process forked; the part of `subprocess.Popen` that tests use."""

    def __init__(self, function: str, arguments: Any, environment: Mapping[str, str], *files: IO[bytes]) -> None:
        self._status = Path(tempfile.mkstemp(prefix="rank-status-")[1])
        paths = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in files]
        request = [function, json.dumps(arguments), dict(environment), *paths, str(self._status)]
        self.pid = _fork(request)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the rank runs."""
        if self.returncode is None and (status := self._status.read_text()):
            self.returncode = int(status)
            self._status.unlink()
        return self.returncode

    def wait(self) -> int:
        """Waits for the end. Returns the exit status."""
        while (status := self.poll()) is None:
            time.sleep(0.01)
        return status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@cache
def _warm_process() -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    process = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)
    return process


def _fork(request: list[Any]) -> int:
    process = _warm_process()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def _serve() -> None:
    for module in SLOW_IMPORTS:
        importlib.import_module(module)

    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"
    status_files: dict[int, str] = {}
    while True:
        if select.select([sys.stdin], [], [], 0.01)[0]:
            line = os.read(0, 1 << 20)
            while line and not line.endswith(b"\n"):
                line += os.read(0, 1 << 20)
            if not line:
                return  # the tests have ended
            function, arguments, environment, out, err, status_file = json.loads(line)
            if not (pid := os.fork()):
                _be_rank(function, arguments, environment, out, err)
            status_files[pid] = status_file
            print(pid, flush=True)
        while status_files:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            Path(status_files.pop(pid)).write_text(str(os.waitstatus_to_exitcode(status)))


def _be_rank(function: str, arguments: str, environment: dict[str, str], out: str, err: str) -> None:
    """Runs a rank in a child of the warm process, and ends the process."""
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # TMPDIR may be another
        from ranks import run_rank

        run_rank(function, arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    _serve()
