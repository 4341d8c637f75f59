"""Facts about this process and its machine: its node's name, its checkout, and how it ends with its parent."""

import ctypes
import os
import signal
import socket
from pathlib import Path

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


def node_name() -> str:
    """This node's name: Slurm's where Slurm started the process (several may share a host), else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
