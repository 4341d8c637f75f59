"""A process that forks ranks for tests of the watchdog: each beats three times, then hangs in the way that was asked.

It reads a request `[HOW, FOLDER, MINUTES]` in JSON per line. When that rank has ended, it answers with its exit status
and the process id of its watch.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from flat_state import flat_config

from cmscale.distributed.world import World
from cmscale.engine.watchdog import Watchdog
from cmscale.runs.folder import RunDir


def hold_the_gil() -> None:
    import ctypes

    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # a PyDLL call keeps the GIL
    for _ in range(2):  # the second call blocks for ever, and no signal interrupts it
        library.pthread_mutex_lock(mutex)


def main(how: str, folder: str, minutes: float, tell: int) -> None:
    watchdog = Watchdog(
        RunDir(Path(folder)),
        flat_config(f"engine.step_timeout_minutes={minutes}"),
        World(rank=3, num_ranks=4),
    )
    os.write(tell, str(watchdog.pid).encode())
    for step in range(3):
        watchdog.beat(step)
    match how:
        case "waits":
            threading.Event().wait()
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()
        case "wakes":  # stopped for twice the limit, once with its watch and once alone, and back at work each time
            limit = 60 * minutes
            for stopped in ([watchdog.pid, os.getpid()], [os.getpid()]):
                for process in stopped:
                    subprocess.Popen(["sh", "-c", f"kill -STOP {process}; sleep {2 * limit}; kill -CONT {process}"])
                time.sleep(limit / 2)
                for step in range(3):
                    watchdog.beat(step)
                    time.sleep(limit / 2)
            watchdog.stop()
        case "gil":
            hold_the_gil()
        case "beats":
            until = time.monotonic() + 4 * 60 * minutes
            while time.monotonic() < until:
                watchdog.beat(5)
                threading.Event().wait(0.02)
            worker = os.fork()  # like a data worker, it keeps the pipe open
            if worker == 0:
                signal.pause()
            watchdog.stop()
            os.kill(worker, signal.SIGKILL)
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)


def serve() -> None:
    for line in iter(sys.stdin.readline, ""):
        told, tell = os.pipe()
        rank = os.fork()
        if rank == 0:
            try:
                how, folder, minutes = json.loads(line)
                main(how, folder, minutes, tell)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(tell)
        watch = os.read(told, 32).decode()
        os.close(told)
        print(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]), watch, flush=True)


if __name__ == "__main__":
    serve()
    os._exit(0)  # torch takes a while to end
