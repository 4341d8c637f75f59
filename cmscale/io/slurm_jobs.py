"""Asks Slurm about jobs: their states, why they wait, and how they are ended."""

import os
import re
import subprocess
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from cmscale.io.slurm import options_in

ACTIVE_STATES = frozenset(
    {
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "COMPLETING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "RESIZING",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
    }
)
"""States in which a job still runs or will run (squeue's names)."""
States = dict[str, str]
"""Of a job or the tasks of an array: squeue's names such as `PENDING`, each with its reason such as `Priority`."""

_STATE = re.compile(r"^[ ]*(?P<job>\d+)[ ]+(?P<state>[A-Z_]+)[ ]*(?P<rest>.*)$", re.MULTILINE)


def clusters_of(script: Path) -> str | None:
    """The clusters of a multi-cluster site that a batch script names, to one of which its job went."""
    with suppress(OSError):
        return options_in(script.read_text()).get("clusters")
    return None


def cancel_command(job_id: str, clusters: str | None = None) -> list[str]:
    """The command that ends a job."""
    return ["scancel", *([f"--clusters={clusters}"] if clusters else []), job_id]


def job_states(job_id: str, clusters: str | None = None) -> States | None:
    """The states of a job or of an array's tasks.

    Args:
        clusters: Those of a multi-cluster site that may have the job; None is this host's.

    Returns:
        None if Slurm does not answer; no state if it knows no such job (any more).

    Raises:
        FileNotFoundError: there is no squeue on the PATH.
    """
    return states_of_jobs([job_id], clusters)[job_id]


def states_of_jobs(job_ids: Collection[str], clusters: str | None = None) -> dict[str, States | None]:
    """`job_states` of many jobs, about which Slurm is asked once. An array is named by its number alone.

    Raises:
        FileNotFoundError: there is no squeue on the PATH.
    """
    asked = _squeue(clusters, "--states=all", "--format=%F %T %r", "--jobs", ",".join(job_ids))
    unknown = "Invalid job id" in asked.stderr  # printed of a single one alone
    if asked.returncode and not unknown:
        return dict.fromkeys(job_ids)
    found: dict[str, States | None] = {job_id: {} for job_id in job_ids}
    for line in _STATE.finditer(asked.stdout):  # with clusters there are lines such as `CLUSTER: c1`, too
        states = found.get(line["job"])
        if states is not None and not is_held(states.get(line["state"], "")):
            states[line["state"]] = line["rest"].strip()
    return found


def job_of_script(script: Path) -> str | None:
    """The id of the newest job that waits or runs and was submitted with a script; empty if there is none.

    Args:
        script: Known by its last two names, as another path may lead to its folder by now.

    Returns:
        None if Slurm does not answer.

    Raises:
        FileNotFoundError: there is no squeue on the PATH, or no script.
    """
    options = options_in(script.read_text())
    named = ["--name", options["job-name"]] if "job-name" in options else []
    asked = _squeue(options.get("clusters"), "--states=all", "--format=%F %T %o", *named)
    if asked.returncode:
        return None
    mine = [
        int(line["job"])
        for line in _STATE.finditer(asked.stdout)
        if line["state"] in ACTIVE_STATES and Path(line["rest"].strip()).parts[-2:] == script.parts[-2:]
    ]
    return str(max(mine)) if mine else ""


def is_held(reason: str) -> bool:
    """Whether a job waits until somebody releases it, as `JobHeldUser` and `launch failed requeued held` say."""
    return "held" in reason.lower()


def reason_to_wait(states: States) -> str | None:
    """Slurm's reason why a job waits in the queue, or will once it has ended as it was requeued on hold; else None."""
    if "RUNNING" in states:
        return None
    held = (reason for state, reason in states.items() if state in ACTIVE_STATES and is_held(reason))
    return next(held, states.get("PENDING"))


def why_it_waits(job_id: str, reason: str, clusters: str | None = None) -> str:
    """Slurm's reason why a job waits in the queue; of one that is held also how it goes on."""
    if not is_held(reason):
        return reason or "Slurm gives no reason"
    release = ["scontrol", *([f"--cluster={clusters}"] if clusters else []), "release", job_id]
    return f"{reason}; {' '.join(release)} lets it go on"


def _squeue(clusters: str | None, *options: str) -> subprocess.CompletedProcess[str]:
    """Asks about jobs.

    Raises:
        FileNotFoundError: there is no squeue on the PATH.
    """
    command = ["squeue", "--noheader", *options]
    command += [f"--clusters={clusters}"] if clusters else []
    # SQUEUE_PARTITION and the like would hide the job.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
