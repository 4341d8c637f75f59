"""Shows other machines that a run's launcher is alive: a file in its logs that it touches every few seconds.

A lock tells the processes of one machine apart; many file systems do not show it to others. Ages are differences of
times that the file system itself gave, so clocks of machines do not matter.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cmscale.io.json_text import parse_json
from cmscale.io.process import process_space, start_of
from cmscale.io.reading import read_regular
from cmscale.runs.folder import RunDir

BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""A launcher that has not touched its file for so long is dead, or its machine is."""
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Sign:
    """A launcher's sign of life; `age_seconds` have passed since. `touched` is when, by the file system's clock."""

    host: str
    process: int
    machine: str
    age_seconds: float
    touched: float


def machine_id() -> str:
    """Names this machine's running kernel: locks of its processes are seen by each other."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


@contextmanager
def beating(run: RunDir) -> Iterator[None]:
    """Gives signs of life for this process while the block runs."""
    path, stop = run.launcher_sign, threading.Event()
    who = {"host": socket.gethostname(), "process": os.getpid(), "machine": machine_id()}
    own = json.dumps(
        who | {"space": process_space(), "started": start_of(os.getpid()), "run": str(run.root.absolute())}
    )
    thread = threading.Thread(target=_beat, args=(path, stop), name="heartbeat", daemon=True)
    with contextlib.suppress(OSError):  # a full disk is reported by those who need it
        path.write_text(own)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError):
            if path.read_text() == own:
                path.unlink()


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def sign_from_elsewhere(run: RunDir) -> Sign | None:
    """The sign of a launcher that lives on another machine; None if there is none.

    One that was given lately is watched until it is given again, or too old: a file may also be new because the run was
    copied here, or its launcher was killed a moment ago.
    """
    first = _read_sign(run)
    if first is None or first.machine == machine_id() or first.age_seconds >= SILENT_SECONDS:
        return None
    wait = SILENT_SECONDS - first.age_seconds
    print(
        f"{run.root}: a launcher, process {first.process} on host {first.host}, gave a sign of life "
        f"{first.age_seconds:.0f} s ago; waiting up to {wait:.0f} s for another one",
        file=sys.stderr,
        flush=True,
    )
    until = time.monotonic() + wait
    while time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
        sign = _read_sign(run)
        if sign is None and not run.launcher_sign.exists():
            return None
        if sign is not None and (sign.process, sign.touched) != (first.process, first.touched):
            return sign
    return None


def _read_sign(run: RunDir) -> Sign | None:
    probe = run.launcher_sign.with_name(f".launcher-probe-{os.getpid()}")
    try:
        given = parse_json(read_regular(run.launcher_sign))
        probe.write_text("")
        touched = run.launcher_sign.stat().st_mtime
        age = max(probe.stat().st_mtime - touched, 0.0)
        return Sign(str(given["host"]), int(given["process"]), str(given["machine"]), age, touched)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
