"""Calls Slurm's commands: submission, states of jobs, and the sbatch parameters that all our jobs share."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.io.process import CHECKOUT

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

PYTHON_PATH = f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}"
"""A line of a batch script: Python finds this checkout's packages, from any folder."""


class NoJobIdError(UserError):
    """Raised when sbatch accepts a job without saying its id."""


def common_parameters(
    *,
    job_name: str,
    nodes: int,
    tasks_per_node: int,
    cpus_per_task: int,
    minutes: int,
    partition: str | None,
    mem_gb: int = 0,
) -> dict[str, Any]:
    """Arguments of submitit's `SlurmExecutor.update_parameters` that all our jobs share.

    Args:
        minutes: The time limit.
        partition: None is the cluster's default partition.
        mem_gb: Memory per node; 0 requests all of it.
    """
    return {
        "job_name": job_name,
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "cpus_per_task": cpus_per_task,
        "time": minutes,
        "mem": f"{mem_gb}GB" if mem_gb else "0",
        "stderr_to_stdout": True,
        # srun does not inherit the CPU count from sbatch since Slurm 22.05.
        "srun_args": [f"--cpus-per-task={cpus_per_task}"],
        "setup": [PYTHON_PATH],
        "additional_parameters": {"requeue": True},
        **({"partition": partition} if partition else {}),
    }


def submit(script: Path, *options: str, environment: Mapping[str, str] | None = None) -> str:
    """Submits a batch script with sbatch. Returns the job id.

    Args:
        options: Options of sbatch; they override those in the script.
        environment: The variables that sbatch and the job get; None is this process's.

    Raises:
        UserError: Slurm refuses the job or does not answer, or there is no sbatch.
        NoJobIdError: sbatch accepted the job, but what it printed holds no job id; do not submit it again.
    """
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        raise UserError("no sbatch on the PATH; run this on a login node of the cluster") from None
    if ran.returncode:
        raise UserError(f"Slurm refuses the job: {refusal(ran.stderr or ran.stdout)}")
    # A site's wrapper of sbatch may print lines of its own before or after the id.
    job_id = re.search(r"^(\d+)(;\S*)?\s*$", ran.stdout, re.MULTILINE)
    if job_id is None:
        raise NoJobIdError(
            f"sbatch accepted the job, but printed no job id: {refusal(ran.stdout)}; find the job with squeue"
        )
    return job_id[1]


def refusal(output: str) -> str:
    """The reason in what sbatch printed: its own lines if there are any, else all lines, joined into one."""
    lines = output.strip().splitlines()
    return "; ".join([line for line in lines if line.startswith("sbatch:")] or lines or ["sbatch gave no reason"])


def job_states(job_id: str) -> set[str] | None:
    """The states of a job or of an array's tasks, such as `RUNNING`.

    Returns:
        An empty set if Slurm knows no such job (any more), None if Slurm does not answer.

    Raises:
        FileNotFoundError: there is no squeue on the PATH.
    """
    command = ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job_id]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        return set(asked.stdout.split())
    return set() if "Invalid job id" in asked.stderr else None


def outside_of_jobs(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without a job's own variables, which sbatch would read as options of another job."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"
    }
