"""Owns a preparation on a Slurm cluster: an array of tasks that share the shards, and the wait for it."""

import io
import shlex
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.storage import LocalStorage
from cmscale.runs.manifests import Document, read_document
from data_prep.job import PROGRESS, Job
from data_prep.progress import Ticker
from data_prep.shards import Record, Settings
from data_prep.sources import open_source

CHECKOUT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 2.0
_NOTE = f"{PROGRESS}/array.json"
_REFUSED = f"{PROGRESS}/refused-"


class ArrayNote(Document):
    """The array that writes there: a submitter that was killed leaves it running, and the next one waits for it."""

    job_id: str


class Cluster(Document):
    """What Slurm is asked for, a task."""

    nodes: int
    cpus: int
    minutes: int
    partition: str | None = None


class ArrayFailed(RuntimeError):
    """An array that ended without having made its shards; one line."""


def share(job: Job, cluster: Cluster, *, array: str | None, max_bad: int) -> dict[int, Record]:
    """Has the missing shards made by an array of `cluster.nodes` tasks, or by `array` if it runs; waits for them.

    Raises:
        UserError: Slurm refuses the array, or a task the images.
        ArrayFailed: it ended, and shards are missing.
    """
    if array is None:
        for entry in list(job.storage.list(_REFUSED)):
            job.storage.delete(entry.key)
        job_id = _submit(job, cluster, max_bad=max_bad)
        job.storage.write(_NOTE, ArrayNote(job_id=job_id).to_bytes())
        print(f"array {job_id} of {min(cluster.nodes, job.num_shards)} tasks; their words: {_logs(job)}", flush=True)
    else:
        job_id = array
        print(f"array {job_id} is still at it", flush=True)
    try:
        _wait(job, job_id)
    except KeyboardInterrupt:
        subprocess.run(["scancel", job_id], check=False)
        raise
    for entry in job.storage.list(_REFUSED):
        raise UserError(job.storage.read(entry.key).decode())
    records = job.records()
    if len(records) < job.num_shards:
        missing = job.num_shards - len(records)
        raise ArrayFailed(f"array {job_id} ended and {missing} shards are missing; see {_logs(job)}; run it again")
    return records


def work(source: str, settings: dict, out: str, *, task: int, tasks: int, workers: int, max_bad: int) -> None:
    """One task of the array: makes each of its shards that is missing; on a requeue goes on where it stopped."""
    from data_prep.prepare import make_missing

    job = Job(open_source(source), Settings.model_validate(settings), out, lane=f"-{task}")
    records = job.records()
    numbers = [number for number in range(task, job.num_shards, tasks) if number not in records]
    try:
        with job.alone():
            make_missing(job, {}, numbers, workers=workers, max_bad=max_bad)
    except UserError as error:
        job.storage.write(f"{_REFUSED}{task:06d}", str(error).encode())
    finally:
        job.read.close()


def _submit(job: Job, cluster: Cluster, *, max_bad: int) -> str:
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    tasks = min(cluster.nodes, job.num_shards)
    executor = SlurmExecutor(_logs(job))
    executor.update_parameters(
        job_name="prepare",
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=cluster.cpus,
        array_parallelism=tasks,
        time=cluster.minutes,
        mem="0",  # all of a node's
        stderr_to_stdout=True,
        srun_args=[f"--cpus-per-task={cluster.cpus}"],  # srun 22.05 takes no CPU count from sbatch
        setup=[f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        additional_parameters={"requeue": True},
        **({"partition": cluster.partition} if cluster.partition else {}),
    )
    settings, out = job.settings.model_dump(), job.storage.url
    try:
        with redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what it also raises
            jobs = [
                executor.submit(
                    work,
                    job.source.name,
                    settings,
                    out,
                    task=task,
                    tasks=tasks,
                    workers=cluster.cpus,
                    max_bad=max_bad,
                )
                for task in range(tasks)
            ]
    except FileNotFoundError:
        raise UserError("--slurm: no sbatch on the PATH; run it on a login node, or without --slurm") from None
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line for line in str(error).splitlines() if line.startswith("sbatch:")] or str(error).splitlines()
        raise UserError(f"Slurm refuses the array: {'; '.join(said)}") from None
    return jobs[0].job_id.split("_")[0]


def _logs(job: Job) -> Path:
    """A folder that all nodes see: beside the notes, or below the working directory where the notes are on S3."""
    if isinstance(job.storage, LocalStorage):
        return job.storage.root.absolute() / PROGRESS / "slurm"
    return Path.cwd() / ".cmscale-prepare" / job.identity


def running(job: Job) -> str | None:
    """The array of an earlier submitter, if Slurm still has tasks of it."""
    raw = job.storage.read_if_present(_NOTE)
    if raw is None:
        return None
    job_id = read_document(ArrayNote, raw, origin=_NOTE).job_id
    return job_id if _active(job_id) else None


def _active(job_id: str) -> bool:
    """Whether tasks of the array wait or run; True where Slurm does not answer."""
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--format=%T", "--jobs", job_id], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError("--slurm: no squeue on the PATH; run it on a login node, or without --slurm") from None
    if asked.returncode:
        return "Invalid job id" not in asked.stderr
    return bool(asked.stdout.split())


def _wait(job: Job, job_id: str, pause: Callable[[float], None] = time.sleep) -> None:
    """Shows the images in finished shards until the array has ended, or a task refuses."""

    def finished() -> int:
        notes = {entry.key for entry in job.storage.list(f"{PROGRESS}/")}
        return sum(len(job.keys(n)) for n in range(job.num_shards) if job.record_key(n) in notes)

    with Ticker(total=job.plan.keys, done=finished()) as ticker:
        while _active(job_id):
            if next(iter(job.storage.list(_REFUSED)), None):
                subprocess.run(["scancel", job_id], check=False)
                while _active(job_id):
                    pause(POLL_SECONDS)
                return
            ticker.set(finished())
            pause(POLL_SECONDS)
