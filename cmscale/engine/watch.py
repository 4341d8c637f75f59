"""The watching process of `watchdog`: it imports the standard library only and shares nothing with its rank."""

import contextlib
import importlib.util
import os
import select
import signal
import sys
import time
from collections.abc import Callable

PATIENCE = 5.0  # seconds for the rank to write its stacks
SETTLE = 0.1  # seconds: as threads go on, any may take a signal, and write stacks while the main thread's change
LINGER = 10.0  # seconds before the kill, at most: peers that wait for this rank write their stacks too


def main() -> None:
    """Reads heartbeats (the step, 8 bytes) from standard input until the rank ends, closes the pipe, or is late.

    Time in which this process was stopped does not count (Slurm suspends all processes of a job), and a rank that was
    stopped gets the whole limit once it goes on.
    """
    rank_process, limit, rank = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    events, stacks, start = sys.argv[4:7]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends them to every process of a step
    pause = min(1.0, limit / 10)
    step, silent, was_stopped, looked = -1, 0.0, False, time.monotonic()
    while os.getppid() == rank_process:
        beats = read_beats(pause)
        now, is_stopped = time.monotonic(), state_of(rank_process) in "Tt"
        silent += min(now - looked, 2 * pause)
        looked = now
        if beats == b"":
            return
        if beats is None and silent > limit:
            beats = end(rank_process, rank=rank, step=step, limit=limit, events=events, stacks=stacks, start=start)
            if not beats:
                return
            looked = time.monotonic()
        if beats is not None:
            step = int.from_bytes(beats[-8:], "little", signed=True)
        if beats is not None or (was_stopped and not is_stopped):
            silent = 0.0
        was_stopped = is_stopped


def read_beats(timeout: float) -> bytes | None:
    """Heartbeats that have arrived, None if there are none within the time; empty if the rank has closed the pipe."""
    ready, _, _ = select.select([0], [], [], timeout)
    return os.read(0, 4096) if ready else None


def end(process: int, *, rank: int, step: int, limit: float, events: str, stacks: str, start: str) -> bytes | None:
    """Has the rank write its stacks, records a `fault` in events.jsonl, and kills the rank.

    The first kill ends the job. If one rank hangs, all others wait for it and are late within moments, and only their
    stacks show which one it is: so the kill waits for them.

    Args:
        start: Names the start of the job in the record, by which the launcher finds it; empty outside a job.

    Returns:
        The heartbeats of a rank that went on before the kill, as a stopped one may once it is continued here.
    """
    state = state_of(process)
    stopped = " (the process was stopped)" if state in "Tt" else ""
    before = size(stacks)
    os.kill(process, signal.SIGCONT)  # a stopped process would write nothing
    time.sleep(SETTLE)
    os.kill(process, signal.SIGUSR1)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and size(stacks) == before:
        time.sleep(0.02)
    time.sleep(0.2)  # the stacks of the other threads
    record = {"time": time.time(), "event": "fault", "step": step, "rank": rank}
    if start:
        record["start"] = start
    beats = None
    try:
        with contextlib.suppress(OSError):  # the file system may be why the rank hangs
            if size(stacks) > before:
                record["waits_for_others"] = waits_for_others(stacks, before)
        append = load_append()
        append(events, record | {"why": f"no step within {limit:g} s{stopped}; stacks in {stacks}"}, durable=True)
        beats = read_beats(min(LINGER, limit / 2))
        if beats:
            event, why = "recovered", f"a step after all, more than {limit:g} s after the one before{stopped}"
            append(events, record | {"time": time.time(), "event": event, "why": why}, durable=True)
    finally:
        if not beats:
            os.kill(process, signal.SIGKILL)  # also if the disk is full
    return beats


def waits_for_others(stacks: str, begin: int) -> bool:
    """Whether the rank's main thread waits in a collective, by the stacks in a file from a place on.

    The main thread is the last, and its innermost call comes first. On a CUDA device a collective returns at once, so
    that ranks which wait for it don't show that here.
    """
    with open(stacks, "rb") as file:  # noqa: PTH123
        file.seek(begin)
        main = file.read().decode(errors="replace").rpartition("(most recent call first):")[2]
    return "/torch/distributed/" in main.strip().partition("\n")[0]


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
