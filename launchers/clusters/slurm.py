"""Runs jobs on Slurm: writes the batch script (submitit's, with our epilogue), submits it, and waits for the end."""

import os
import shlex
import shutil
import socket
import sys
import time
from contextlib import suppress

import submitit

from cmscale.config.site import read_site
from cmscale.errors import UserError
from cmscale.io import slurm, slurm_jobs
from cmscale.io.durable import replace_durably
from cmscale.io.packages import check_tested, private
from cmscale.runs.folder import RunDir
from launchers.clusters.base import rank_command
from launchers.clusters.slurm_waiting import wait_for_end
from launchers.jobs import JobSpec
from launchers.placement import Placement, PlacementRequest, RankPlace
from launchers.submission import Submission, submissions_of

DEFAULT_MINUTES = 24 * 60
DEFAULT_GPUS_PER_NODE = 8
_LOOKS_AFTER_SECONDS = (1, 4, 10)  # slurmctld is slow where it lets sbatch wait in vain


class SlurmCluster:
    """Slurm, through sbatch on the PATH."""

    name = "slurm"

    def suits(self, request: PlacementRequest) -> bool:
        # A plan for several nodes can be printed where there is no Slurm.
        return shutil.which("sbatch") is not None or (request.dry_run and request.nodes > 1)

    def place(self, request: PlacementRequest) -> Placement:
        if shutil.which("sbatch") is None and not request.dry_run:
            raise UserError(
                "--cluster slurm: there is no sbatch on the PATH; log in to the cluster, or use --cluster local"
            )
        minutes = request.minutes or DEFAULT_MINUTES
        signal_seconds = request.restart.signal_seconds
        if minutes * 60 <= signal_seconds:
            raise UserError(
                f"--time: {minutes} minutes end before the signal to save, which comes restart.signal_seconds "
                f"{signal_seconds} before the end; request more time or lower it"
            )
        gpus = request.device != "cpu"
        in_gres = request.slurm.gpus_in_gres()
        if in_gres is not None and request.ranks_per_node not in (None, in_gres):
            raise UserError(
                f"slurm.gres {request.slurm.gres}: requests {in_gres} GPUs per node, --gpus-per-node "
                f"{request.ranks_per_node}; leave one of them out"
            )
        if request.gpu_type and not gpus:
            raise UserError(f"--gpus-per-node {request.gpu_type}:N: engine.device is cpu; give a number of ranks")
        ranks = request.ranks_per_node or in_gres or (DEFAULT_GPUS_PER_NODE if gpus else 1)
        return Placement(
            self.name,
            request.nodes,
            ranks,
            gpus,
            request.partition,
            minutes,
            request.slurm,
            request.restart,
            request.gpu_type,
        )

    def describe(self, placement: Placement) -> str:
        return f"Slurm, partition {placement.partition or '(default)'}"

    def preview(self, job: JobSpec) -> str:
        return script_text(job)

    def refuse_if_running(self, run: RunDir, worker: str) -> None:
        for submission in submissions_of(run):
            if not _is_unfinished(submission, worker):
                continue
            job_id, clusters = submission.read_job().job_id, slurm_jobs.clusters_of(submission.script)
            what = f"job {job_id} of this run" if job_id else f"the job of {submission.folder}"
            silent = f"{run.root}: {what} has not reported its end, and"
            gone = "if the job is gone, add --take-over"
            try:
                job_id = job_id or slurm_jobs.job_of_script(submission.script)
                if job_id:
                    states = slurm_jobs.job_states(job_id, clusters)
                else:  # Slurm does not answer; or it did not take the job, or that is over
                    states = None if job_id is None else {}
            except FileNotFoundError:
                raise UserError(
                    f"{silent} there is no squeue on the PATH to ask; run this on a login node of its cluster; {gone}"
                ) from None
            if states is None:
                raise slurm.NoAnswer(f"{silent} Slurm does not answer; try again later; {gone}")
            if not states and (owner := _other_owner(submission)):  # PrivateData=jobs shows each user's own jobs alone
                raise UserError(f"{silent} Slurm shows this user no such job, which is {owner}'s; {gone}")
            for state in sorted(states.keys() & slurm_jobs.ACTIVE_STATES):
                assert job_id, "only a job with an id has states"
                cancel = " ".join(slurm_jobs.cancel_command(job_id, clusters))
                raise UserError(f"{run.root}: job {job_id} of this run is {state}; end it first: {cancel}")

    def run(self, job: JobSpec, *, wait: bool) -> int:
        submission = Submission(job.run, job.submission)
        submission.write_job(job.worker, job.arguments, code=job.code)
        replace_durably(submission.script, script_text(job).encode())
        try:
            job_id = slurm.submit(submission.script)
        except (slurm.MaybeTaken, slurm.NoJobIdError) as error:
            job_id = _found(submission, error)
        except slurm.Refused as error:
            shutil.rmtree(submission.folder, ignore_errors=True)  # else its job would be looked for
            if isinstance(error, slurm.QueueFull):
                raise slurm.QueueFull(f"{error}; give the same command again once fewer jobs are queued") from None
            is_about_it = "partition" in str(error).lower() and not isinstance(error, slurm.NoAnswer)
            if job.placement.partition and is_about_it:
                raise type(error)(f"{error}; --partition names another than {job.placement.partition}") from None
            raise
        submission.replace_job_id(job_id)
        print(f"job {job_id} submitted; log: {job.run.logs}/{job_id}_0_log.out", flush=True)
        job.taken()
        return wait_for_end(submission) if wait else 0

    def enter_rank(self) -> RankPlace:
        environment = submitit.JobEnvironment()
        return RankPlace(
            rank=environment.global_rank,
            num_ranks=environment.num_tasks,
            local_rank=environment.local_rank,
            ranks_per_node=environment.num_tasks // environment.num_nodes,
            master_address="127.0.0.1" if environment.num_nodes == 1 else _address(environment.hostnames[0]),
            master_port=master_port(environment.raw_job_id, os.environ.get("SLURM_RESTART_COUNT", "0")),
        )


class _ScriptWriter(submitit.SlurmExecutor):
    """submitit's executor, of which we take the batch script alone. It can be written where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def script_text(job: JobSpec) -> str:
    """The batch script of a job: its ranks under srun, then the epilogue, which decides what follows."""
    if "%" in str(job.run.root):
        raise UserError(
            f"{job.run.root}: Slurm replaces what follows a % in the paths of logs; take a folder of runs without it"
        )
    placement, restart, settings = job.placement, job.placement.restart, job.placement.slurm
    assert placement.minutes is not None
    submission = Submission(job.run, job.submission)
    shared = slurm.common_parameters(
        job_name=job.run.name,
        nodes=placement.nodes,
        tasks_per_node=placement.ranks_per_node,
        cpus_per_task=settings.cpus_per_task,
        minutes=placement.minutes,
        partition=placement.partition,
        mem_gb=None,
        options=settings.options(),
        setup=[*settings.setup, *slurm.exports(read_site().environment)],
        srun_args=settings.srun_args,
        code=job.code,
    )
    # -K1: a rank that fails ends all others, which would hang in a collective. --wait=0: rank 0 may end long after the
    # others, when all copies are made, whatever the site's WaitTime is.
    shared["srun_args"] = ["--wait=0", "-K1", *shared["srun_args"]]
    shared["additional_parameters"] |= {"output": str(job.run.logs / "%j_batch.log")}
    interpreter = settings.batch_interpreter(sys.executable)
    during, after = _evaluation_lines(job, interpreter)
    shared["setup"] += [
        'start="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        "trap : TERM  # the epilogue runs even if Slurm ends the job; ranks have handlers of their own",
        *during,
    ]
    epilogue = [*interpreter, "-P", "-m", "launchers.clusters.slurm_epilogue", str(job.run.root), job.submission]
    limits = (
        f"--max-restarts {restart.max_restarts} --backoff-seconds {restart.backoff_seconds} "
        f"--signal-seconds {restart.signal_seconds}"
    )
    shared["teardown"] = [
        "status=$?",
        "trap '' TERM  # a requeue ends this script: its last commands go on to their end",
        *after,
        f'{shlex.join(epilogue)} "$start" --status $status {limits}',
    ]
    count = placement.ranks_per_node
    gpus = f"{placement.gpu_type}:{count}" if placement.gpu_type else count
    writer = _ScriptWriter(job.run.logs)
    writer.update_parameters(
        **shared,
        signal_delay_s=restart.signal_seconds,
        **({"gpus_per_node": gpus} if placement.gpus and settings.gpus_in_gres() is None else {}),
    )
    command = rank_command(SlurmCluster.name, submission, "", settings.rank_interpreter(sys.executable))
    ranks = shlex.join(command[:-1]) + ' "$start"'
    check_tested("submitit")
    return private(writer, "_make_submission_file_text", package="submitit")(ranks, "") + "\n"


def _evaluation_lines(job: JobSpec, interpreter: list[str]) -> tuple[list[str], list[str]]:
    """Lines that look for checkpoints to evaluate while ranks run, and once more after them."""
    if not job.evaluations:
        return [], []
    command = [*interpreter, "-P", "-m", "launchers.evaluate_checkpoints"]
    return [f"{shlex.join([*command, *job.evaluations])} &"], [shlex.join([*command, "--once", *job.evaluations])]


def _found(submission: Submission, error: slurm.MaybeTaken | slurm.NoJobIdError) -> str:
    """The id of a job that sbatch did not say, once the queue shows it. Raises `error`, and more, if it does not."""
    print("sbatch said no job id; looking for the job in the queue", file=sys.stderr, flush=True)
    for wait in _LOOKS_AFTER_SECONDS:
        time.sleep(wait)
        with suppress(FileNotFoundError):
            if job_id := slurm_jobs.job_of_script(submission.script):
                return job_id
    see = f"see squeue --name={submission.run.name}; without a job there, {submission.how_to_go_on}"
    raise type(error)(f"{error}; {see}")


def _is_unfinished(submission: Submission, worker: str) -> bool:
    """Whether a submission's job is this worker's and has not reported its end: of a local one nobody would know."""
    try:
        record = submission.read_job()
    except UserError:  # damaged: ranks refuse to start from it, too
        return False
    was_submitted = record.job_id is not None or submission.script.exists()
    return record.worker == worker and was_submitted and not submission.ending_file.exists()


def _other_owner(submission: Submission) -> str:
    """The user who submitted a job, if that is another one; else nothing."""
    try:
        status = submission.job_file.stat()
        return "" if status.st_uid == os.getuid() else submission.job_file.owner()
    except OSError:
        return ""
    except KeyError:  # a user whom this node does not know
        return "another user"


def master_port(job_id: str, restart: str) -> int:
    """A port that all ranks compute alike: below the ephemeral ports, and another one after each restart."""
    return 10000 + (int(job_id) * 37 + int(restart)) % 20000


def _address(host: str) -> str:
    """The first node's address: by its name, or as srun, which runs there, reports its own.

    A name that resolves to a loopback address leads other nodes to themselves.
    """
    as_srun_says = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    with suppress(OSError):
        by_name = socket.gethostbyname(host)
        if not by_name.startswith("127.") or not as_srun_says:
            return by_name
    return as_srun_says or host
