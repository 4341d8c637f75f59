"""The watching process of `watchdog`: it imports the standard library only and shares nothing with its rank."""

import importlib.util
import os
import select
import signal
import sys
import time
from collections.abc import Callable

PATIENCE = 5.0  # seconds for the rank to write its stacks
LINGER = 10.0  # seconds before the kill, at most: peers that wait for this rank write their stacks too


def main() -> None:
    """Reads heartbeats (the step, 8 bytes) from standard input until the rank ends, closes the pipe, or is late."""
    rank_process, limit, rank = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    events, stacks = sys.argv[4], sys.argv[5]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends them to every process of a step
    step, heard = -1, time.monotonic()
    while os.getppid() == rank_process:
        ready, _, _ = select.select([0], [], [], min(1.0, limit / 10))
        if ready:
            beats = os.read(0, 4096)
            if not beats:
                return
            step, heard = int.from_bytes(beats[-8:], "little", signed=True), time.monotonic()
        elif time.monotonic() - heard > limit:
            end(rank_process, rank=rank, step=step, limit=limit, events=events, stacks=stacks)
            return


def end(process: int, *, rank: int, step: int, limit: float, events: str, stacks: str) -> None:
    """Has the rank write its stacks, records a `fault` in events.jsonl, and kills the rank.

    The first kill ends the job. If one rank hangs, all others wait for it and are late within moments, and only their
    stacks show which one it is: so the kill waits for them.
    """
    state = state_of(process)
    stopped = " (the process was stopped)" if state in "Tt" else ""
    before = size(stacks)
    os.kill(process, signal.SIGUSR1)
    os.kill(process, signal.SIGCONT)  # a stopped process would write nothing
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and size(stacks) == before:
        time.sleep(0.02)
    time.sleep(0.2)  # the stacks of the other threads
    why = f"no step within {limit:g} s{stopped}; stacks in {stacks}"
    record = {"time": time.time(), "event": "fault", "step": step, "rank": rank, "why": why}
    try:
        load_append()(events, record, durable=True)
        time.sleep(min(LINGER, limit / 2))
    finally:
        os.kill(process, signal.SIGKILL)  # also if the disk is full


def load_append() -> Callable[..., None]:
    """`append` of cmscale/runs/append.py, the one writer of events, loaded by its path: there is no package here."""
    path = os.path.join(os.path.dirname(__file__), os.pardir, "runs", "append.py")  # noqa: PTH118, PTH120
    spec = importlib.util.spec_from_file_location("append", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.append


def state_of(process: int) -> str:
    """The process's state letter, as Linux names it; `?` elsewhere."""
    try:
        with open(f"/proc/{process}/stat") as file:  # noqa: PTH123 (pathlib takes long to load)
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "?"


def size(path: str) -> int:
    """The size of a file in bytes, 0 if there is none."""
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return 0


if __name__ == "__main__":
    main()
