"""Finds what differs between a run that was killed again and again and one that was left alone."""

import re
import time
from pathlib import Path

import psutil

from cmscale.engine.checkpoint_reader import list_checkpoints, verify_checkpoint
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines

_ANSWERED = re.compile(r"^storage answers again, after (\d+) s", re.MULTILINE)


def differences(golden: RunDir, run: RunDir, *, steps: int) -> list[str]:
    """Lines of metrics.jsonl (replayed ones too) and files of the last checkpoint that differ from the golden run."""
    expected = {record["step"]: record["loss"] for record in read_lines(golden.metrics)}
    got = [(record["step"], record["loss"]) for record in read_lines(run.metrics)]
    found = [f"step {step}: loss {loss!r}, golden {expected[step]!r}" for step, loss in got if loss != expected[step]]
    found += [f"step {step}: never logged" for step in sorted(expected.keys() - dict(got).keys())]
    ends = [{path.name: path.read_bytes() for path in each.checkpoint(steps).glob("rank-*")} for each in (golden, run)]
    if not ends[0]:
        found.append("the golden run has no last checkpoint")
    found += [f"{name}: other weights" for name in sorted(ends[0] | ends[1]) if ends[0].get(name) != ends[1].get(name)]
    return found


def repeated_steps(run: RunDir) -> list[int]:
    """How many steps each start repeated."""
    counts: list[int] = []
    last = 0
    for record in read_lines(run.metrics):
        if record["step"] <= last:
            counts.append(last - record["step"] + 1)
        last = record["step"]
    return counts


def waits(run: RunDir) -> list[int]:
    """The seconds of every wait for storage, by the logs of the run's processes; those that were killed in one lack."""
    return [int(wait) for log in sorted(run.logs.glob("*_log.out")) for wait in _ANSWERED.findall(log.read_text())]


def flaws_of_copies(url: str, *, newest: int) -> list[str]:
    """What is wrong with the copies of a run's checkpoints."""
    copies = list_checkpoints(url)
    found = [f"copy of step {copy.step}: {problem}" for copy in copies for problem in verify_checkpoint(copy.url)]
    return found if newest in {copy.step for copy in copies} else [*found, f"step {newest} was not exported"]


def orphans(pids: set[int]) -> list[int]:
    """Those of the processes that still exist after 10 seconds."""
    until = time.monotonic() + 10
    while True:
        left = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.2)


def left_in_shared_memory(pids: set[int]) -> tuple[list[Path], list[Path]]:
    """Files in /dev/shm named after one of the processes.

    Returns:
        One batch per process, as a worker may be killed after torch has made the file of a batch, `torch_PID_...`, and
        before it has removed its name; and all others, of a program that does not remove them.
    """
    folder = Path("/dev/shm")
    batches: dict[int, Path] = {}
    others: list[Path] = []
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        number = re.search(r"\d+", file.name)
        if not number or (pid := int(number[0])) not in pids:
            continue
        if file.name.startswith("torch_") and pid not in batches:
            batches[pid] = file
        else:
            others.append(file)
    return list(batches.values()), others
