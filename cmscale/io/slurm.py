"""Calls Slurm's commands: submission, states of jobs, and the sbatch parameters that all our jobs share."""

import os
import re
import shlex
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.io.process import CHECKOUT, EARLY_SIGNAL, START

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
NO_NODES = "Slurm has no other nodes for the job"
States = dict[str, str]
"""Of a job or the tasks of an array: squeue's names such as `PENDING`, each with its reason such as `Priority`."""

_TRANSIENT = re.compile(
    r"[Uu]nable to contact|[Tt]imed out|[Cc]onnection (refused|reset|failure)|[Cc]ommunication|[Tt]emporarily|try again"
    r"|[Ss]tandby|[Zz]ero [Bb]ytes|[Tt]ransport endpoint|[Uu]nexpected message|[Aa]uthentication|[Tt]ransition|[Bb]usy"
)

_STATE = re.compile(r"^[ ]*(?P<job>\d+)[ ]+(?P<state>[A-Z_]+)[ ]*(?P<reason>.*)$", re.MULTILINE)
_OF_JOBS = (
    *("SLURM_", "SLURMD_", "SLURMSTEPD_", "SBATCH_", "SRUN_", "SALLOC_", "SUBMITIT_", "PMI_", "PMIX_", "OMPI_"),
    "TORCHELASTIC_",  # with torchrun's, rank 0 would wait for a store that nobody opens
)
_OF_RANKS = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", START, EARLY_SIGNAL),
    }
)
_DEVICES = frozenset({"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GPU_DEVICE_ORDINAL"})


def python_path(code: Path = CHECKOUT) -> str:
    """A line of a batch script: Python finds the packages in a folder, not in the one where the job starts."""
    return f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"


class Refused(UserError):
    """Raised when Slurm does not accept a job: nothing was submitted."""


class NoAnswer(Refused):
    """Raised when slurmctld can't be asked now: nobody made a mistake."""

    status = 1


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
        Refused: Slurm refuses the job or does not answer (NoAnswer), or there is no sbatch.
        NoJobIdError: sbatch accepted the job, but what it printed holds no job id; do not submit it again.
    """
    printed = _sbatch(["--parsable", *options, str(script)], environment, "Slurm refuses the job")
    # A site's wrapper of sbatch may print lines of its own before or after the id.
    job_id = re.search(r"^(\d+)(;\S*)?\s*$", printed, re.MULTILINE)
    if job_id is None:
        raise NoJobIdError(
            f"sbatch accepted the job, but printed no job id: {refusal(printed)}; find the job with squeue"
        )
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
        if is_silence(why):
            raise NoAnswer(f"Slurm does not take jobs at the moment: {why}; give the same command again later")
        raise Refused(f"{refused}: {why}")
    return ran.stdout


def is_silence(said: str) -> bool:
    """Whether a command of Slurm says that slurmctld did not get a request or can't act on it now. Else it refuses."""
    return bool(_TRANSIENT.search(said)) and "nvalid" not in said


def refusal(output: str) -> str:
    """The reason in what sbatch printed: its own lines if there are any, else all lines, joined into one."""
    lines = output.strip().splitlines()
    return "; ".join([line for line in lines if line.startswith("sbatch:")] or lines or ["sbatch gave no reason"])


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
    asked = _squeue(",".join(job_ids), clusters, "--states=all", "--format=%F %T %r")
    unknown = "Invalid job id" in asked.stderr  # printed of a single one alone
    if asked.returncode and not unknown:
        return dict.fromkeys(job_ids)
    found: dict[str, States | None] = {job_id: {} for job_id in job_ids}
    for line in _STATE.finditer(asked.stdout):  # with clusters there are lines such as `CLUSTER: c1`, too
        states = found.get(line["job"])
        if states is not None and not is_held(states.get(line["state"], "")):
            states[line["state"]] = line["reason"].strip()
    return found


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


def _squeue(job_ids: str, clusters: str | None, *options: str) -> subprocess.CompletedProcess[str]:
    """Asks about jobs, whose numbers commas separate.

    Raises:
        FileNotFoundError: there is no squeue on the PATH.
    """
    command = ["squeue", "--noheader", *options, "--jobs", job_ids]
    command += [f"--clusters={clusters}"] if clusters else []
    # SQUEUE_PARTITION and the like would hide the job.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


def outside_of_jobs(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without variables of jobs and ranks, which sbatch and srun would read as options of another job.

    SLURM_CONF stays: it says which Slurm this is, and SLURM_JWT, by which some log in. Inside of a job its devices are
    left out, too.
    """
    of_this_job = _OF_RANKS | _DEVICES if "SLURM_JOB_ID" in environment else _OF_RANKS
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(("SLURM_CONF", "SLURM_JWT")) or not (name.startswith(_OF_JOBS) or name in of_this_job)
    }


@contextmanager
def outside_of_this_job() -> Iterator[None]:
    """Takes the variables of jobs and ranks out of this process's environment while the block runs."""
    before, kept = dict(os.environ), outside_of_jobs()
    for name in before.keys() - kept.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


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
