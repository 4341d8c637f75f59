"""Owns jobs on Slurm: the sbatch script (submitit's, with our epilogue), submission, waiting."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from launchers.follow import Follower, show_end
from launchers.job import Job
from launchers.outcome import (
    ATTEMPT,
    SUBMISSION,
    begin_submission,
    how_to_go_on,
    read_json,
    submission_folder,
    write_json,
)
from launchers.plan import Plan

CHECKOUT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 1.0
LONGEST_SILENCE_SECONDS = 600.0


class PlannedExecutor(SlurmExecutor):
    """submitit's executor, which can also say its script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(run: RunDir, plan: Plan, *, submission: str) -> PlannedExecutor:
    executor = PlannedExecutor(run.logs)
    slurm, restart = plan.slurm, plan.restart
    path = f"{shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    optional = {
        "partition": plan.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
    }
    epilogue = [
        executor.python,
        "-m launchers.restart",
        shlex.quote(str(run.root)),
        f"--status $status --max-restarts {restart.max_restarts} --backoff-seconds {restart.backoff_seconds} "
        f"--signal-seconds {restart.signal_seconds}",
    ]
    beside = [executor.python, "-m launchers.beside", shlex.join(plan.beside)] if plan.beside else []
    executor.update_parameters(
        job_name=run.name,
        nodes=plan.nodes,
        ntasks_per_node=plan.ranks_per_node,
        cpus_per_task=slurm.cpus_per_task,
        time=plan.minutes,
        signal_delay_s=restart.signal_seconds,
        mem=f"{slurm.mem_gb}GB" if slurm.mem_gb else "0",  # 0: all of a node's
        stderr_to_stdout=True,
        # -K1: one rank that ends badly ends all, which would hang. srun 22.05 takes no CPU count from sbatch.
        srun_args=["-K1", f"--cpus-per-task={slurm.cpus_per_task}"],
        setup=[
            f"export PYTHONPATH={path}",
            f"export {SUBMISSION}={shlex.quote(submission)}",
            f'export {ATTEMPT}="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"',
            "trap : TERM  # the epilogue runs, too, when Slurm ends the job; ranks have their own handlers",
            *([f"{' '.join(beside)} &"] if beside else []),
        ],
        teardown=[
            "status=$?",
            *([" ".join([*beside[:2], "--once", *beside[2:]])] if beside else []),
            " ".join(epilogue),
        ],
        additional_parameters={"requeue": True, "output": str(run.logs / "%j_batch.log")},
        **({"gpus_per_node": plan.ranks_per_node} if plan.gpus else {}),
        **{name: value for name, value in optional.items() if value},
    )
    return executor


def script_text(run: RunDir, plan: Plan, *, submission: str) -> str:
    """The sbatch script that `run_slurm` submits."""
    executor = _executor(run, plan, submission=submission)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def run_slurm(worker: str, args: tuple, *, run: RunDir, plan: Plan, submission: str, wait: bool) -> int:
    """Submits a worker; with `wait` follows it through requeues and resubmissions to its end.

    Returns:
        The exit status: 0, 1, 2; 0 once submitted without `wait`.

    Raises:
        UserError: sbatch refuses the job.
    """
    executor = _executor(run, plan, submission=submission)
    folder = begin_submission(run, submission, worker=worker)
    try:
        job = executor.submit(Job(worker, args, run_dir=str(run.root)))
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line for line in str(error).splitlines() if line.startswith("sbatch:")] or str(error).splitlines()
        raise UserError(f"Slurm refuses the job: {'; '.join(said)}") from None
    write_json(folder / "job.json", {"job_id": job.job_id, "worker": worker})
    print(f"job {job.job_id} submitted; its words: {run.logs}/{job.job_id}_0_log.out", flush=True)
    return wait_for_end(run, submission) if wait else 0


def wait_for_end(run: RunDir, submission: str) -> int:
    """Shows rank 0's log until the submission has ended; Ctrl-C leaves the job alone."""
    folder = submission_folder(run, submission)
    follower = Follower()
    silent_since: float | None = None
    try:
        while True:
            job_id = (read_json(folder / "job.json") or {})["job_id"]
            log = run.logs / f"{job_id}_0_log.out"
            state = job_state(job_id)
            follower.show(log)
            if ending := read_json(folder / "ending.json"):
                rank_log = run.logs / f"{job_id}_{ending['rank']}_log.out"
                return show_end(ending["ending"], ending["why"], log=rank_log if rank_log.exists() else log)
            if state is None:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > LONGEST_SILENCE_SECONDS:
                    return show_end("fault", f"Slurm does not answer about job {job_id}", log=log)
            else:
                silent_since = None
            if state in (
                "gone",
                "CANCELLED",
                "FAILED",
                "TIMEOUT",
                "NODE_FAIL",
                "OUT_OF_MEMORY",
                "DEADLINE",
                "BOOT_FAIL",
            ):
                time.sleep(2 * POLL_SECONDS)  # the epilogue's last words may still be on their way
                if (read_json(folder / "job.json") or {})["job_id"] == job_id and not (folder / "ending.json").exists():
                    how = "ended without a word" if state == "gone" else state.lower()
                    return show_end("cancelled", f"job {job_id}: {how}; {how_to_go_on(folder)}", log=log)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\nno longer waiting; the job goes on (scancel ends it), run {run.root}", file=sys.stderr)
        return 130
    finally:
        follower.close()


def job_state(job_id: str) -> str | None:
    """`PENDING`, `RUNNING`, ...; `gone` where Slurm knows no such job; None where it does not answer."""
    command = ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job_id]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        return asked.stdout.strip() or "gone"
    return "gone" if "Invalid job id" in asked.stderr else None


def refuse_running_job(run: RunDir, worker: str) -> None:
    """Raises UserError where a job of an earlier submission of this worker is still in the queue."""
    for folder in sorted(run.logs.glob("submissions/*/job.json")):
        job = read_json(folder) or {}
        if job.get("worker") != worker or folder.with_name("ending.json").exists():
            continue
        if (job_id := job.get("job_id")) is None:  # a launcher's on this machine, or not submitted
            continue
        try:
            state = job_state(job_id)
        except FileNotFoundError:  # no Slurm on this machine
            return
        if state in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED"):
            raise UserError(f"{run.root}: job {job_id} of this run is {state}; scancel {job_id} first")
