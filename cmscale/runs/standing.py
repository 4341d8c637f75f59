"""Says whether a run is alive, and how that is known: by its events, its launcher, Slurm, or what was written last."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmscale.io.counting import in_words
from cmscale.io.json_text import parse_json
from cmscale.io.process import is_alive, process_space
from cmscale.io.reading import read_regular
from cmscale.io.slurm_jobs import (
    ACTIVE_STATES,
    States,
    clusters_of,
    is_held,
    job_states,
    reason_to_wait,
    states_of_jobs,
    why_it_waits,
)
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines, state_of

SILENT_SECONDS = 60.0
"""A launcher on another machine that has not touched its file for so long is dead, or its machine is."""
QUIET_SECONDS = 600.0
"""A run that has written nothing for so long, and whose launcher or job is not seen, is called stale."""
JobStates = Callable[[str, str | None], States | None]
"""Says the states of a Slurm job, given its number and its clusters, as `cmscale.io.slurm_jobs.job_states` does."""
_ENDED = ("finished", "finished, not exported", "superseded")
_STOPPED = ("preempted", "fault")


@dataclass(frozen=True)
class _Life:
    """What is known of a run's launcher or job; `is_alive` None: that can't be told from here."""

    is_alive: bool | None
    state: str
    known_by: str


_CERTAINTY = {True: 2, None: 1, False: 0}
"""Of what is known of launcher and job, that counts which says that one of them is alive, or may be."""


def how_it_stands(run: RunDir, events: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """The state of a run, as in `Overview`, and how it is known."""
    return state_and_reason(run, state_of(events), quiet_seconds(run, time.time()))


def quiet_seconds(run: RunDir, now: float) -> float | None:
    """Since anything of the run was written; None if nothing was, or only by a clock that is far ahead of this one."""
    times = []
    for path in (run.metrics, run.events, run.checkpoints):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    times = [each for each in times if each - now < QUIET_SECONDS]
    return max(now - max(times), 0.0) if times else None


def state_and_reason(
    run: RunDir, last: str, quiet: float | None, states_of: JobStates | None = None
) -> tuple[str, str]:
    """The state, and how it is known. `last` is what the events say; without `states_of` Slurm is asked."""
    if last in _ENDED:
        return last, "events.jsonl"
    lives = [_slurm_job(run, states_of or job_states), _launcher(run)]  # a job knows more than one who waits for it
    life = max(filter(None, lives), key=lambda life: _CERTAINTY[life.is_alive], default=None)
    if life is not None and life.is_alive:
        return life.state, life.known_by
    if why := _why_cancelled(run):
        return "cancelled", why
    seen = "no launcher or job of it is seen from here" if life is None else life.known_by
    if last in _STOPPED:
        return last, f"events.jsonl; {seen}"
    if quiet is not None and quiet < QUIET_SECONDS and (life is None or life.is_alive is None):
        return "running", f"written {quiet:.0f} s ago; {seen}"
    if last == "never started":
        return last, seen
    written = "nothing dated before now was written" if quiet is None else f"nothing written for {in_words(quiet)}"
    return "stale", f"{written}; {seen}"


def _launcher(run: RunDir) -> _Life | None:
    """What the file says that a launcher touches while it lives."""
    try:
        sign = parse_json(read_regular(run.launcher_sign))
        host, process, space = str(sign["host"]), int(sign["process"]), sign.get("space")
        age = time.time() - run.launcher_sign.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    if not _is_at(run, sign["run"]) if "run" in sign else _is_copy(run):  # older releases name no run
        return None
    what = f"launcher {process} on {host}"
    if space == process_space() if space else host == socket.gethostname():  # older releases name the host alone
        lives = is_alive(process, str(sign.get("started"))) if space else _lives(process)
        return _Life(lives, "running", what if lives else f"{what} has ended")
    if age <= -QUIET_SECONDS:  # of a clock that was wrong: else a dead one would live until then
        return _Life(None, "", f"{what} gave its last sign of life at a time that is {in_words(-age)} ahead")
    if age < SILENT_SECONDS:
        return _Life(True, "running", f"{what}, alive {max(age, 0.0):.0f} s ago")
    return _Life(None, "", f"{what} has been silent for {in_words(age)}")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def ask_slurm_at_once(runs: Iterable[RunDir]) -> JobStates:
    """Asks Slurm about the jobs of many runs, once per cluster. Returns what gives its answers."""
    wanted: dict[str | None, set[str]] = {}
    for run in runs:
        for number, clusters in filter(lambda job: job[0].isdecimal(), _unreported_jobs(run)):
            wanted.setdefault(clusters, set()).add(number)
    known: dict[tuple[str, str | None], States | None] = {}
    with contextlib.suppress(FileNotFoundError):  # there is no squeue here
        for clusters, numbers in wanted.items():
            states = states_of_jobs(sorted(numbers), clusters)
            known.update({(number, clusters): states[number] for number in numbers})

    def answer(number: str, clusters: str | None) -> States | None:
        if (number, clusters) in known:
            return known[number, clusters]
        return job_states(number, clusters)  # one that was submitted in the meantime

    return answer


def _trainings(run: RunDir) -> Iterator[tuple[Path, Any]]:
    """The folder and the record of each training of a run: the last one first. A copy of a run has none of its own."""
    for folder, record in _submitted(run):
        if _is_of(run, record):
            yield folder, record


def _is_copy(run: RunDir) -> bool:
    """Whether a run's folder is a copy, in which nothing was submitted since, of one that is still there."""
    return next((not _is_of(run, record) for _, record in _submitted(run)), False)


def _is_of(run: RunDir, record: dict[str, Any]) -> bool:
    """Whether a job trains in this folder, as far as can be told: not in another one that is still there."""
    with contextlib.suppress(LookupError, TypeError):  # of an older release
        return _is_at(run, record["arguments"][0])
    return True


def _is_at(run: RunDir, path: Any) -> bool:
    """Whether a run had this path when it was written, as far as can be told: it is none of another folder."""
    with contextlib.suppress(OSError, TypeError, ValueError):
        return Path(path).samefile(run.root)
    return True  # the folder was moved


def _submitted(run: RunDir) -> Iterator[tuple[Path, Any]]:
    """The folder and the record of each training that lies in a run's logs: the last one first.

    Their folders have the time when they were submitted, by a clock that may have been set back since.
    """
    jobs: list[Path] = []
    with contextlib.suppress(OSError):
        jobs = sorted(run.logs.glob("submissions/*/job.json"), reverse=True)
    for job in jobs:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = parse_json(read_regular(job))
            if "train" in str(record["worker"]):  # evaluations and samples are jobs of their own
                yield job.parent, record


def _unreported_jobs(run: RunDir) -> Iterator[tuple[str, str | None]]:
    """The jobs of a run that have not reported their end, with their clusters: the last one first."""
    for folder, record in _trainings(run):
        if record.get("job_id") and not (folder / "ending.json").exists():
            with contextlib.suppress(ValueError):  # a script that is no text
                yield str(record["job_id"]), clusters_of(folder / "job.sh")


def _why_cancelled(run: RunDir) -> str:
    """What the last training that was submitted says of its end, if it was cancelled; else nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, StopIteration):
        folder, _ = next(_trainings(run))
        file = folder / "ending.json"
        ending = parse_json(read_regular(file))
        began = [event["time"] for event in read_lines(run.events) if event["event"] in ("start", "resumed")]
        is_of_last = not began or file.stat().st_mtime >= began[-1]  # none is submitted where torchrun starts a run
        return str(ending["why"]) if is_of_last and ending["ending"] == "cancelled" else ""
    return ""


def _slurm_job(run: RunDir, states_of: JobStates) -> _Life | None:
    """What Slurm says about the jobs of the run that have not reported their end: of one that is alive, if any is."""
    gone: _Life | None = None
    for number, clusters in _unreported_jobs(run):
        try:
            states = states_of(number, clusters)
        except FileNotFoundError:  # there is no squeue here
            return None
        if states is None:
            return _Life(None, "", f"Slurm does not answer about job {number}")  # nor about another
        active = sorted(states.keys() & ACTIVE_STATES)
        if not active:
            gone = gone or _Life(False, "", f"Slurm has no job {number} any more")
            continue
        state = next((one for one in ("RUNNING", "PENDING") if one in active), active[0])
        name, is_so = {"PENDING": "queued"}.get(state, state.lower()), f"Slurm job {number} is {state}"
        if (reason := reason_to_wait(states)) is not None:
            name = "held" if is_held(reason) else name
            is_so += f": {why_it_waits(number, reason, clusters)}"
        return _Life(True, name, is_so)
    return gone
