"""Starts and kills the processes of a run on this machine."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

CHECKOUT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
PATIENCE = 600.0  # seconds in which something must happen; a start may take minutes on a busy machine


class Stuck(RuntimeError):
    """Raised when the run does not reach the moment or the end that it should reach."""


def start(root: Path, name: str, config: Path | None) -> subprocess.Popen[bytes]:
    """Starts the launcher of a new run or, without a config, resumes the run."""
    command = [sys.executable, str(CHECKOUT / "launchers" / "submit.py"), "--cluster", "local"]
    command += ["--gpus-per-node", str(NUM_RANKS), "--runs-dir", str(root)]
    command += ["--resume", name] if config is None else ["--name", name, str(config)]
    with log_of(root, name).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def log_of(root: Path, name: str) -> Path:
    return root / f"{name}.log"


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[bytes]) -> bool:
    """Waits for a condition. Returns False if the launcher ended first. Raises Stuck after `PATIENCE` seconds."""
    until = time.monotonic() + PATIENCE
    while not condition():
        if launcher.poll() is not None:
            return False
        if time.monotonic() > until:
            raise Stuck(f"nothing happened for {PATIENCE:g} s")
        time.sleep(0.002)
    return True


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, itself first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The processes of the ranks under a launcher, by rank; empty unless all are running."""
    found: dict[int, psutil.Process] = {}
    for process in family(launcher):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            environment = process.environ()
            is_rank = "launchers.job" in process.cmdline() and "SUBMITIT_LOCAL_GLOBALID" in environment
            parent = process.parent()
            if is_rank and parent is not None and "launchers.clusters.local_controller" in parent.cmdline():
                found[int(environment["SUBMITIT_LOCAL_GLOBALID"])] = process
    return [found[rank] for rank in sorted(found)] if len(found) == NUM_RANKS else []
