"""A process for tests of the watchdog: it beats three times, then hangs in the way that its argument names."""

import os
import signal
import subprocess
import sys
import threading
import time
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


def main() -> None:
    how, folder, minutes = sys.argv[1:]
    watchdog = Watchdog(
        RunDir(Path(folder)),
        flat_config(f"engine.step_timeout_minutes={minutes}"),
        World(rank=3, num_ranks=4),
    )
    print(watchdog.pid, flush=True)
    for step in range(3):
        watchdog.beat(step)
    match how:
        case "waits":
            threading.Event().wait()
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()
        case "wakes":  # stopped for twice the limit, once with its watch and once alone, and back at work each time
            limit = 60 * float(minutes)
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
            until = time.monotonic() + 4 * 60 * float(minutes)
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


if __name__ == "__main__":
    main()
