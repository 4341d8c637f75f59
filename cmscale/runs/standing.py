"""Says whether a run is alive, and how that is known: by its events, its launcher, Slurm, or what was written last."""

import contextlib
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmscale.io.counting import in_words
from cmscale.io.json_text import parse_json
from cmscale.io.reading import read_regular
from cmscale.io.slurm import ACTIVE_STATES, clusters_of, job_states
from cmscale.runs.folder import RunDir
from cmscale.runs.log import state_of

SILENT_SECONDS = 60.0
"""A launcher on another machine that has not touched its file for so long is dead, or its machine is."""
QUIET_SECONDS = 600.0
"""A run that has written nothing for so long, and whose launcher or job is not seen, is called stale."""
_ENDED = ("finished", "finished, not exported", "superseded")
_STOPPED = ("preempted", "fault")


@dataclass(frozen=True)
class _Life:
    """What is known of a run's launcher or job; `is_alive` None: that can't be told from here."""

    is_alive: bool | None
    state: str
    known_by: str


def how_it_stands(run: RunDir, events: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """The state of a run, as in `Overview`, and how it is known."""
    return state_and_reason(run, state_of(events), quiet_seconds(run, time.time()))


def quiet_seconds(run: RunDir, now: float) -> float | None:
    """Since anything of the run was written; None if nothing was."""
    times = []
    for path in (run.metrics, run.events, run.checkpoints):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(now - max(times), 0.0) if times else None


def state_and_reason(run: RunDir, last: str, quiet: float | None) -> tuple[str, str]:
    """The state, and how it is known. `last` is what the events say."""
    if last in _ENDED:
        return last, "events.jsonl"
    life = _launcher(run) or _slurm_job(run)
    if life is not None and life.is_alive:
        return life.state, life.known_by
    seen = "no launcher or job of it is seen from here" if life is None else life.known_by
    if last in _STOPPED:
        return last, f"events.jsonl; {seen}"
    if quiet is not None and quiet < QUIET_SECONDS and (life is None or life.is_alive is None):
        return "running", f"written {quiet:.0f} s ago; {seen}"
    if last == "never started":
        return last, seen
    return "stale", f"nothing written for {_span(quiet)}; {seen}"


def _launcher(run: RunDir) -> _Life | None:
    """What the file says that a launcher touches while it lives."""
    try:
        sign = parse_json(read_regular(run.launcher_sign))
        host, process = str(sign["host"]), int(sign["process"])
        age = max(time.time() - run.launcher_sign.stat().st_mtime, 0.0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    what = f"launcher {process} on {host}"
    if host == socket.gethostname():
        is_alive = _lives(process)
        return _Life(is_alive, "running", what if is_alive else f"{what} has ended")
    if age < SILENT_SECONDS:
        return _Life(True, "running", f"{what}, alive {age:.0f} s ago")
    return _Life(None, "", f"{what} has been silent for {_span(age)}")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def _slurm_job(run: RunDir) -> _Life | None:
    """What Slurm says about the jobs of the run that have not reported their end: of one that is alive, if any is.

    Their names have the time when they were submitted, by a clock that may have been set back since.
    """
    gone: _Life | None = None
    jobs: list[Path] = []
    with contextlib.suppress(OSError):
        jobs = sorted(run.logs.glob("submissions/*/job.json"), reverse=True)
    for job in jobs:
        if (job.parent / "ending.json").exists():
            continue
        try:
            described = parse_json(read_regular(job))
            number = described["job_id"]
            if "evaluate" in str(described["worker"]) or not number:
                continue
            states = job_states(str(number), clusters_of(job.with_name("job.sh")))
        except (OSError, ValueError, KeyError, TypeError):  # FileNotFoundError: there is no squeue here
            continue
        if states is None:
            return _Life(None, "", f"Slurm does not answer about job {number}")  # nor about another
        active = sorted(states & ACTIVE_STATES)
        if not active:
            gone = gone or _Life(False, "", f"Slurm has no job {number} any more")
            continue
        state = "running" if "RUNNING" in active else "queued" if "PENDING" in active else active[0].lower()
        return _Life(True, state, f"Slurm job {number} is {active[0]}")
    return gone


def _span(seconds: float | None) -> str:
    return "a while" if seconds is None else in_words(seconds)
