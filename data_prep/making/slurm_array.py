"""Makes the shards of a preparation with an array of Slurm tasks: submits it, follows it, and runs its tasks."""

import io
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from pathlib import Path

from cmscale.config import Slurm
from cmscale.config.site import read_site
from cmscale.config.storage import StorageKeys
from cmscale.errors import NoSpace, UserError
from cmscale.io.job_environment import outside_of_this_job
from cmscale.io.slurm import common_parameters, exports, refusal
from cmscale.io.slurm_jobs import ACTIVE_STATES, cancel_command, job_states
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import Document, read_document
from cmscale.runs.snapshot import read_code, take_snapshot
from data_prep.making.documents import PROGRESS, as_begun, begun_plan
from data_prep.making.preparation import Preparation
from data_prep.making.processes import make_missing
from data_prep.making.progress import ProgressCounter
from data_prep.making.shards import DatasetSettings, ShardRecord
from data_prep.sources import open_source

POLL_SECONDS = 2.0
_ARRAY = f"{PROGRESS}/array.json"
_REFUSED = f"{PROGRESS}/refused-"
_LOGS_OF_S3 = ".cmscale-prepare"


class ArrayRecord(Document):
    """Stored with the progress records: a submitter that was killed leaves its array running for the next one."""

    job_id: str
    clusters: str | None = None


class TaskRefusal(Document):
    """Why a task made none of its shards any more, for the submitter to report."""

    why: str
    no_space: bool = False

    def error(self) -> UserError:
        """What the task raised."""
        return NoSpace(self.why) if self.no_space else UserError(self.why)


class ArrayTask(Document):
    """The arguments of one task, as JSON: it makes every `tasks`-th shard from number `task` on."""

    source: str
    settings: DatasetSettings
    out: str
    task: int
    tasks: int
    workers: int
    max_bad: int
    storage: StorageKeys = StorageKeys()


class ArrayPlacement(Document):
    """Where an array runs: number of tasks (one per node), and each task's CPUs, time limit and partition.

    Of `slurm` everything is used that does not place ranks or request GPUs.
    """

    nodes: int
    cpus: int
    minutes: int
    partition: str | None = None
    slurm: Slurm = Slurm()


class ArrayFailed(RuntimeError):
    """Raised when an array ended without making all shards; the message is one line."""


def make_with_array(
    preparation: Preparation, placement: ArrayPlacement, *, running: ArrayRecord | None, max_bad: int
) -> dict[int, ShardRecord]:
    """Makes the missing shards with a new array, or waits for the array `running`.

    Raises:
        UserError: Slurm refuses the array, or a task refuses the images; NoSpace: a task's disk is full.
        ArrayFailed: the array ended and shards are missing.
    """
    logs = _log_folder(preparation)
    if running is None:
        preparation.storage.delete_all([entry.key for entry in preparation.storage.list(_REFUSED)])
        job_id = _submit(preparation, placement, max_bad=max_bad)
        array = ArrayRecord(job_id=job_id, clusters=_clusters(placement))
        try:
            preparation.storage.write(_ARRAY, array.to_bytes())
        except BaseException:  # no later command could know of it
            _cancel(array)
            raise
        tasks = min(placement.nodes, preparation.num_shards)
        of_tasks = "1 task" if tasks == 1 else f"{tasks} tasks"
        print(f"array {array.job_id} submitted with {of_tasks}; logs: {logs}", flush=True)
    else:
        array = running
        print(f"array {array.job_id} of an earlier command is still running; waiting for it", flush=True)
    try:
        _wait(preparation, array)
    except KeyboardInterrupt:
        _cancel(array)
        raise
    for told in _refusals(preparation):
        raise told.error()
    records = preparation.records()
    if len(records) < preparation.num_shards:
        missing = preparation.num_shards - len(records)
        raise ArrayFailed(
            f"array {array.job_id} ended, {missing} of {preparation.num_shards} shards are missing; "
            f"see the logs in {logs}, then run the same command again"
        )
    if logs.parent.name == _LOGS_OF_S3:  # others are removed with the progress records
        shutil.rmtree(logs, ignore_errors=True)
        with suppress(OSError):  # another array's are there
            logs.parent.rmdir()
    return records


def running_array(preparation: Preparation) -> ArrayRecord | None:
    """The array that an earlier command submitted, if it is waiting or running."""
    raw = preparation.storage.read_if_present(_ARRAY)
    if raw is None:
        return None
    array = read_document(ArrayRecord, raw, origin=_ARRAY)
    return array if _active(array) else None


def run_task(arguments: str) -> None:
    """Runs one task of an array, an `ArrayTask` in JSON: makes those of its shards that are missing.

    After a requeue it continues where it stopped. What it refuses is stored for the submitter to report.
    """
    task = ArrayTask.model_validate_json(arguments)
    task.storage.apply()
    source = as_begun(open_source(task.source), begun_plan(open_storage(task.out)))
    preparation = Preparation(source, task.settings, task.out, lane=f"-{task.task}")
    records = preparation.records()
    numbers = [number for number in range(task.task, preparation.num_shards, task.tasks) if number not in records]
    try:
        with preparation.exclusive():
            make_missing(preparation, {}, numbers, workers=task.workers, max_bad=task.max_bad)
    except UserError as error:
        told = TaskRefusal(why=str(error), no_space=isinstance(error, NoSpace))
        preparation.storage.write(f"{_REFUSED}{task.task:06d}", told.to_bytes())
    finally:
        preparation.read.close()


def _submit(preparation: Preparation, placement: ArrayPlacement, *, max_bad: int) -> str:
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    tasks, slurm = min(placement.nodes, preparation.num_shards), placement.slurm
    python, logs = shlex.join(slurm.rank_interpreter(sys.executable)), _log_folder(preparation)
    executor = SlurmExecutor(logs, python=python)
    executor.update_parameters(
        array_parallelism=tasks,
        **common_parameters(
            job_name="prepare",
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=placement.cpus,
            minutes=placement.minutes,
            partition=placement.partition,
            mem_gb=None,
            options=slurm.options(),
            setup=[*slurm.setup, *exports(read_site().environment)],
            srun_args=slurm.srun_args,
            code=take_snapshot(read_code(), logs / "code"),
        ),
    )
    arguments = [
        ArrayTask(
            source=preparation.source.name,
            settings=preparation.settings,
            out=preparation.storage.url,
            task=task,
            tasks=tasks,
            workers=placement.cpus,
            max_bad=max_bad,
            storage=read_site().storage,
        ).model_dump_json()
        for task in range(tasks)
    ]
    try:
        # submitit prints what it also raises
        with outside_of_this_job(), redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(run_task, one) for one in arguments]
    except FileNotFoundError:
        raise UserError("--slurm: no sbatch on the PATH; run this on a login node, or without --slurm") from None
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"Slurm refuses the array: {refusal(str(error))}") from None
    return jobs[0].job_id.split("_")[0]


def _log_folder(preparation: Preparation) -> Path:
    """A folder that all nodes see: with the progress records, or in the working directory for a data set on S3."""
    local = preparation.storage.local_path(f"{PROGRESS}/slurm")
    return local.absolute() if local else Path.cwd() / _LOGS_OF_S3 / preparation.identity


def _clusters(placement: ArrayPlacement) -> str | None:
    clusters = placement.slurm.options().get("clusters")
    return clusters if isinstance(clusters, str) else None


def _active(array: ArrayRecord) -> bool:
    """Whether tasks of the array are waiting or running; True if Slurm does not answer."""
    try:
        states = job_states(array.job_id, array.clusters)
    except FileNotFoundError:
        raise UserError("--slurm: no squeue on the PATH; run this on a login node, or without --slurm") from None
    return states is None or bool(states.keys() & ACTIVE_STATES)


def _cancel(array: ArrayRecord) -> None:
    subprocess.run(cancel_command(array.job_id, array.clusters), check=False)


def _refusals(preparation: Preparation) -> Iterator[TaskRefusal]:
    """What tasks have refused; a listing may still show what an earlier array did."""
    for entry in preparation.storage.list(_REFUSED):
        if (raw := preparation.storage.read_if_present(entry.key)) is not None:
            yield read_document(TaskRefusal, raw, origin=entry.key)


def _wait(preparation: Preparation, array: ArrayRecord, pause: Callable[[float], None] = time.sleep) -> None:
    """Waits until the array has ended, and cancels it if a task refuses; shows the images in finished shards."""

    def finished() -> int:
        keys = {entry.key for entry in preparation.storage.list(f"{PROGRESS}/")}
        numbers = (n for n in range(preparation.num_shards) if preparation.record_key(n) in keys)
        return sum(len(preparation.keys(n)) for n in numbers)

    with ProgressCounter("preparing", total=preparation.plan.keys, done=finished()) as counter:
        while _active(array):
            if next(_refusals(preparation), None):
                _cancel(array)
                while _active(array):
                    pause(POLL_SECONDS)
                return
            counter.set(finished())
            pause(POLL_SECONDS)
