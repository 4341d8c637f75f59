"""Submits jobs to Slurm: calls sbatch, with the parameters that all our jobs share, and reads its answers."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.io.job_environment import outside_of_jobs
from cmscale.io.process import CHECKOUT

NO_NODES = "Slurm has no other nodes for the job"

_TRANSIENT = re.compile(
    r"[Uu]nable to contact|[Tt]imed out|[Cc]onnection (refused|reset|failure)|[Cc]ommunication|[Tt]emporarily|try again"
    r"|[Ss]tandby|[Zz]ero [Bb]ytes|[Tt]ransport endpoint|[Uu]nexpected message|[Aa]uthentication|[Tt]ransition|[Bb]usy"
)
_NOT_TAKEN = re.compile(
    r"connect failure|[Cc]onnection (refused|failure)|[Ss]tandby|[Tt]emporarily|Unable to create job record"
)
_QUEUE_FULL = re.compile(r"SubmitJobs?(Per[A-Z]\w*)?Limit")  # AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, ...


def python_path(code: Path = CHECKOUT) -> str:
    """A line of a batch script: Python finds the packages in a folder, not in the one where the job starts."""
    return f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"


class Refused(UserError):
    """Raised when Slurm does not accept a job: nothing was submitted."""


class QueueFull(Refused):
    """Raised when a limit counts too many jobs in the queue now: nobody made a mistake."""

    status = 1


class NoAnswer(Refused):
    """Raised when slurmctld can't be asked now: nobody made a mistake."""

    status = 1


class MaybeTaken(NoAnswer):
    """Raised when a job was sent and no answer came: Slurm may have it all the same."""


class NoJobIdError(UserError):
    """Raised when sbatch accepts a job without saying its id."""


def common_parameters(
    *,
    job_name: str,
    nodes: int,
    tasks_per_node: int,
    cpus_per_task: int | None,
    minutes: int,
    partition: str | None,
    mem_gb: int | None = 0,
    options: Mapping[str, str | bool] | None = None,
    setup: Sequence[str] = (),
    srun_args: Sequence[str] = (),
    code: Path = CHECKOUT,
) -> dict[str, Any]:
    """Arguments of submitit's `SlurmExecutor.update_parameters` that all our jobs share.

    Args:
        cpus_per_task: None leaves the number to Slurm.
        minutes: The time limit.
        partition: None is the cluster's default partition.
        mem_gb: Memory per node; 0 requests all of it, None is no request.
        options: Further options of sbatch by long name; True is one without a value.
        setup: Lines of shell that the script runs first.
        srun_args: Further options of srun.
        code: The folder that holds the packages which the job imports.
    """
    given = dict(options or {})
    # What set-up lines changed must not change what the script's own lines mean, nor end the script.
    lines = [*setup, "set +eu +o pipefail"] if setup else []
    if "export" in given:  # sbatch would have srun start ranks without this script's variables
        lines.append("export SLURM_EXPORT_ENV=ALL")
    return {
        "job_name": job_name,
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "time": minutes,
        "stderr_to_stdout": True,
        # srun does not inherit the CPU count from sbatch since Slurm 22.05.
        "srun_args": [*([f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else []), *srun_args],
        "setup": [*lines, python_path(code)],
        "additional_parameters": {"requeue": True, **given},
        "wckey": None,  # submitit's own default is refused by sites that enforce wckeys
        **({"cpus_per_task": cpus_per_task} if cpus_per_task else {}),
        **({} if mem_gb is None else {"mem": f"{mem_gb}GB" if mem_gb else "0"}),
        **({"partition": partition} if partition else {}),
    }


def exports(variables: Mapping[str, str]) -> list[str]:
    """Lines of a script that set variables unless they are set already."""
    return [f'[ -n "${{{name}+set}}" ] || export {name}={shlex.quote(value)}' for name, value in variables.items()]


def submit(script: Path, *options: str, environment: Mapping[str, str] | None = None) -> str:
    """Submits a batch script with sbatch. Returns the job id.

    Args:
        options: Options of sbatch; they override those in the script.
        environment: The variables that sbatch and the job get, but for those of jobs; None is this process's.

    Raises:
        Refused: Slurm refuses the job, for now (QueueFull) or for good, or does not answer (NoAnswer; MaybeTaken where
            it may have the job nonetheless), or there is no sbatch.
        NoJobIdError: sbatch accepted the job, but what it printed holds no job id; do not submit it again.
    """
    printed = _sbatch(["--parsable", *options, str(script)], environment, "Slurm refuses the job")
    # A site's wrapper of sbatch may print lines of its own before or after the id.
    job_id = re.search(r"^(\d+)(;\S*)?\s*$", printed, re.MULTILINE)
    if job_id is None:
        raise NoJobIdError(f"sbatch accepted the job, but printed no job id: {refusal(printed)}")
    return job_id[1]


def find_nodes(script: Path, *options: str) -> None:
    """Has sbatch look for nodes that are up and have all that a job asks for, busy or not. Submits nothing.

    Args:
        options: Options of sbatch; they override those in the script.

    Raises:
        Refused: Slurm has no such nodes, or does not answer (NoAnswer), or there is no sbatch.
    """
    _sbatch(["--test-only", *options, str(script)], None, NO_NODES)


def _sbatch(arguments: list[str], environment: Mapping[str, str] | None, refused: str) -> str:
    """What sbatch prints. Raises Refused, whose message begins with `refused`, or NoAnswer."""
    variables = outside_of_jobs(os.environ if environment is None else environment)
    try:
        ran = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False, env=variables)
    except FileNotFoundError:
        raise Refused("no sbatch on the PATH; run this on a login node of the cluster") from None
    if ran.returncode:
        why = refusal(ran.stderr or ran.stdout)
        last = why.rpartition("; ")[2]  # sbatch may say before that it tries again, as "temporarily unable to accept"
        if _QUEUE_FULL.search(last):
            raise QueueFull(f"{refused}: {why}")
        if is_silence(why) and (_NOT_TAKEN.search(last) or "--test-only" in arguments):
            raise NoAnswer(f"Slurm does not take jobs at the moment: {why}; give the same command again later")
        if is_silence(why):
            raise MaybeTaken(f"Slurm does not answer, and may have taken the job all the same: {why}")
        raise Refused(f"{refused}: {why}")
    return ran.stdout


def is_silence(said: str) -> bool:
    """Whether a command of Slurm says that slurmctld did not get a request or can't act on it now. Else it refuses."""
    return bool(_TRANSIENT.search(said)) and "nvalid" not in said


def refusal(output: str) -> str:
    """The reason in what sbatch printed: its own lines if there are any, else all lines, joined into one."""
    lines = output.strip().splitlines()
    return "; ".join([line for line in lines if line.startswith("sbatch:")] or lines or ["sbatch gave no reason"])


def options_in(script: str) -> dict[str, str]:
    """The options of a batch script by long name; those without a value have an empty one."""
    words = [word for line in script.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]
    return {name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in words)}


def without_fulfilled_dependency(script: str) -> str:
    """A script of a job that has run: without its dependencies, as Slurm refuses those on jobs that it has forgotten.

    `singleton` is kept, as it is fulfilled anew by every job.
    """
    fulfilled = re.compile(r"^#SBATCH --dependency=(?!'?singleton'?$).*\n", re.MULTILINE)
    return fulfilled.sub("", script)
