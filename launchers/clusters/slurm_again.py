"""Starts a Slurm job again at the end of its batch script: requeued, or the same script submitted once more.

Slurm ends a batch script soon: at its time limit, after a preemption's grace, and as soon as it was requeued. So
everything here is bounded by the time that is left.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from cmscale.errors import UserError
from cmscale.io import slurm, slurm_jobs
from cmscale.io.durable import replace_durably
from cmscale.io.remarks import say
from launchers.submission import Submission

_WAITS = (2, 4, 8, 16, 32, 60)  # seconds between tries: slurmctld may be away for a minute or two
_LAST_SECONDS = 5.0  # for writing how the job ended
# Why sbatch refuses what it would refuse in a minute, too: limits count the job that is ending, and some sites let no
# job submit another.
_FOR_GOOD = re.compile(
    rf"QOS|[Ll]imit|[Pp]olicy|[Pp]ermission denied|no sbatch|[Ii]nvalid (partition|account|qos)|{slurm.NO_NODES}"
)
_DONE_ALREADY = re.compile(r"pending", re.IGNORECASE)  # of two tries the first was carried out, but not answered

T = TypeVar("T")
Answer = Literal["done", "refused", "transient"]


@dataclass(frozen=True)
class Again:
    """How a job goes on: `how` completes the sentence "the job was ...", for events and logs."""

    how: str


REQUEUED = Again("requeued")


def waits_within(seconds_left: float | None) -> tuple[float, ...]:
    """The pauses between tries that fit into the time that is left; all of them if that is not known."""
    if seconds_left is None:
        return _WAITS
    fitting, spent = [], 0.0
    for wait in _WAITS:
        spent += wait
        if spent > seconds_left - _LAST_SECONDS:
            break
        fitting.append(wait)
    return tuple(fitting)


def requeue(submission: Submission, job_id: str, *, waits: Sequence[float]) -> Again | None:
    """Returns the job to the queue; where Slurm refuses or there is no scontrol, submits it as a new job at once.

    Returns:
        How it goes on; None if Slurm does not answer within the time, or takes the job neither way.
    """
    answer, message = _requeue(job_id, waits=waits)
    if answer == "done":
        return REQUEUED
    if answer == "transient":
        return None
    again, _ = _submit(submission, delay_seconds=0, exclude=(), waits=waits)
    return again and Again(f"{again.how}, as Slurm does not requeue it ({message})")


def _requeue(job_id: str, *, waits: Sequence[float]) -> tuple[Answer, str]:
    """The last answer and message of Slurm, which is asked again while it does not answer."""
    for wait in (*waits, None):
        answer, message = _requeue_once(job_id)
        if answer != "done":
            say(message, to="stderr")
        if answer != "transient" or wait is None:
            return answer, message
        time.sleep(wait)
    raise AssertionError("unreachable")


def _requeue_once(job_id: str) -> tuple[Answer, str]:
    command = ["scontrol", "requeue", job_id]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "refused", "there is no scontrol on the PATH"
    except OSError as error:
        return "transient", f"{' '.join(command)}: {error}"
    said = " ".join((ran.stderr or ran.stdout).split())
    if ran.returncode == 0 or _DONE_ALREADY.search(said):
        return "done", said
    message = f"{' '.join(command)}: {said or f'exit status {ran.returncode}'}"
    return ("transient" if slurm.is_silence(said) else "refused"), message


def submit_again(
    submission: Submission, *, delay_seconds: int, exclude: Sequence[str], waits: Sequence[float]
) -> Again | None:
    """Submits the same script again: later, without the nodes that failed. The job gets another id.

    Where Slurm does not accept it, this job is requeued: that is none more for limits, and needs no right to submit.

    Returns:
        How it goes on; None if Slurm accepts neither.
    """
    again, refused = _submit(submission, delay_seconds=delay_seconds, exclude=exclude, waits=waits)
    if again is None and _requeue(os.environ["SLURM_JOB_ID"], waits=())[0] == "done":
        return Again(f"requeued, as Slurm does not accept it as a new job ({refused})")
    return again


def _submit(
    submission: Submission, *, delay_seconds: int, exclude: Sequence[str], waits: Sequence[float]
) -> tuple[Again | None, str]:
    """How a job goes on as another one; if Slurm did not accept that, None and why."""
    script = submission.script.read_text()
    given = slurm.options_in(script)
    path = submission.script
    if (again := slurm.without_fulfilled_dependency(script)) != script:
        path = submission.script.with_name("job-again.sh")
        replace_durably(path, again.encode())
    options = [f"--begin=now+{max(1, delay_seconds)}"]
    excluded = _spare(exclude, path, given, waits=waits[:-2])
    if excluded:
        options.append(_exclusion(excluded, given))
    lost: list[UserError] = []
    try:
        job_id = _retry(lambda: _submit_once(path, options, lost), waits=waits)
    except slurm.NoJobIdError as error:
        say(str(error), to="stderr")
        return Again("submitted again"), ""
    except slurm.Refused as error:
        return None, str(error)
    try:
        submission.replace_job_id(job_id)
    except UserError as error:  # a full disk: the job goes on all the same
        say(str(error), to="stderr")
    without = f", without {', '.join(excluded)}" if excluded else ""
    how = f"submitted again as job {job_id} in {delay_seconds} s{without}"
    say(how)
    return Again(how), ""


def _submit_once(script: Path, options: Sequence[str], lost: list[UserError]) -> str:
    """The id of the new job, also where sbatch does not say it, if the queue shows the job: it is not doubled.

    Args:
        lost: Takes the error of a try without an id. The queue often answers only a while later, before the next.

    Raises:
        Refused: Slurm refuses it or does not answer.
        NoJobIdError: Slurm has it.
    """
    if lost and (job_id := _later_job(script)):
        return job_id
    try:
        return slurm.submit(script, *options)
    except (slurm.MaybeTaken, slurm.NoJobIdError) as error:
        lost.append(error)
        if job_id := _later_job(script):
            return job_id
        raise


def _later_job(script: Path) -> str | None:
    """The id of a job that was submitted with a script after this one, if the queue shows it."""
    with suppress(FileNotFoundError):  # there is no squeue on the PATH
        job_id = slurm_jobs.job_of_script(script)
        if job_id and int(job_id) > int(os.environ["SLURM_JOB_ID"]):
            return job_id
    return None


def _retry(action: Callable[[], T], *, waits: Sequence[float]) -> T:
    """What an action returns, tried a bounded number of times.

    Raises:
        Refused: by the last try; there is no other after a refusal that stays.
    """
    for wait in (*waits, None):
        try:
            return action()
        except slurm.Refused as error:
            say(str(error), to="stderr")
            if wait is None or _FOR_GOOD.search(str(error)):
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def _spare(bad: Sequence[str], script: Path, given: dict[str, str], *, waits: Sequence[float]) -> list[str]:
    """The bad nodes on which a job does not insist, if Slurm has enough others for it; else none, and says why."""
    unwished = [node for node in bad if node not in _expanded(given.get("nodelist", ""))]
    if not unwished:
        return []
    try:
        _retry(lambda: slurm.find_nodes(script, _exclusion(unwished, given)), waits=waits)
    except slurm.Refused:
        say(f"so {', '.join(unwished)} can't be left out", to="stderr")
        return []
    return unwished


def _exclusion(nodes: Sequence[str], given: dict[str, str]) -> str:
    """The option of sbatch that leaves nodes out beside those that the job's script leaves out."""
    return f"--exclude={','.join(filter(None, [given.get('exclude'), *nodes]))}"


def _expanded(hostlist: str) -> set[str]:
    """The hosts of a list as Slurm writes it: `node[1-3],gpu7`."""
    if "[" not in hostlist:
        return set(filter(None, hostlist.split(",")))
    try:
        ran = subprocess.run(["scontrol", "show", "hostnames", hostlist], capture_output=True, text=True, check=False)
    except OSError:
        return set()
    return set(ran.stdout.split())
