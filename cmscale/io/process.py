"""Facts about this process and its machine: its node's name, its checkout, and how it ends with its parent."""

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

# The folder that holds the packages cmscale, launchers and data_prep: what a child process needs on its PYTHONPATH.
CHECKOUT = Path(__file__).resolve().parents[2]

EARLY_SIGNAL = "CMSCALE_EARLY_SIGNAL"
"""Variable with the name of a signal that came before a job's worker had handlers: it should stop at once."""

START = "CMSCALE_START"
"""Variable with the name of this start of a job, `SUBMISSION/START`, in the ranks that a launcher starts."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends, however that ends (Linux only)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def note_early_signals() -> None:
    """Notes SIGTERM and SIGUSR2 in EARLY_SIGNAL from now on, until a worker has handlers of its own."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _note_signal)


def _note_signal(number: int, _: FrameType | None) -> None:
    os.environ[EARLY_SIGNAL] = signal.Signals(number).name


def exit_at_once(status: int) -> NoReturn:
    """Ends the process at once: threads and children left by a worker (an upload that hangs) must not delay it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a full disk, which must not change the status
            stream.flush()
    for each in gc.get_objects():  # as wandb's, which Python removes at no such end; other storage may hang
        if type(each) is tempfile.TemporaryDirectory and Path(each.name).parent == Path(tempfile.gettempdir()):
            with contextlib.suppress(Exception):
                each.cleanup()
    os._exit(status)


def node_name() -> str:
    """This node's name: Slurm's where Slurm started the process (several may share a host), else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def process_space() -> str:
    """Names this running kernel and its space of process numbers: containers of one machine have one each."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def start_of(process: int) -> str:
    """When a process of this space started, in ticks since the kernel did; empty if it is dead or can't be seen."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def is_alive(process: int, started: str) -> bool:
    """Whether the process of this space that has this number and start is alive."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return start_of(process) in ("", started)
