"""Owns jobs on this machine: submitit's local executor, restarted after faults, ended with the launcher."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from submitit.local.local import LocalExecutor, LocalJob

from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from launchers.follow import Follower, show_end
from launchers.job import Job
from launchers.outcome import (
    ATTEMPT,
    SUBMISSION,
    Ending,
    begin_submission,
    decide,
    how_to_go_on,
    judge,
    newest_step,
    read_json,
    read_rank_ends,
    record_attempt,
    write_event,
)
from launchers.plan import Plan, visible_gpus

CHECKOUT = Path(__file__).resolve().parents[1]
_NO_LIMIT_MINUTES = 10 * 366 * 24 * 60


class ControlledExecutor(LocalExecutor):
    """submitit's local executor, with `launchers.controller` over the ranks: it ends all when one fails."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        super().__init__(folder)
        self.environment = environment

    def _submit_command(self, command: str) -> LocalJob[str]:
        ranks = self.parameters["tasks_per_node"]
        environment = {
            **self.environment,
            "SUBMITIT_LOCAL_NTASKS": str(ranks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * self.parameters["timeout_min"]),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(self.parameters["signal_delay_s"]),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_EXECUTOR": "local",
        }
        # A session of its own: Ctrl-C reaches the launcher alone, which ends the ranks in good order.
        process = subprocess.Popen(
            [sys.executable, "-m", "launchers.controller", str(self.folder)],
            env=environment,
            start_new_session=True,
        )
        return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=list(range(ranks)))


class Interruption:
    """Ctrl-C or SIGTERM at the launcher: the first asks the ranks to save and end, the second kills them."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if self.process is None or self.process.poll() is not None:
            return
        if again:
            end_group(self.process)
        else:
            self.process.terminate()
            print("stopping: the ranks save and end; again to end them at once", file=sys.stderr, flush=True)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the controller and everything that its ranks left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_local(worker: str, args: tuple, *, run: RunDir, plan: Plan, submission: str) -> int:
    """Runs a worker to its end, and again after faults, as `decide` says.

    Returns:
        The exit status: 0, 1, 2, or 128 + the signal that stopped the launcher.
    """
    interruption = Interruption()
    folder = begin_submission(run, submission, worker=worker)
    for number in range(10**9):
        name = f"attempt-{number}"
        began = time.monotonic()
        process = _start(worker, args, run=run, plan=plan, submission=submission, attempt=name)
        interruption.process = process
        follower = Follower()
        while process.poll() is None:
            follower.show(run.logs / f"{process.pid}_0_log.out")
            time.sleep(0.1)
        follower.show(run.logs / f"{process.pid}_0_log.out")
        follower.close()
        end_group(process)
        leaving: Ending | None = "cancelled" if interruption.signal else None
        if plan.minutes and time.monotonic() - began >= plan.minutes * 60 - plan.restart.signal_seconds:
            leaving = leaving or "time_limit"
        exits = read_json(folder / name / "exits.json") or {"first": None, "status": 1}
        killed = (*_place(exits["first"]),) if exits["first"] else None
        ends = read_rank_ends(folder / name)
        attempt = judge(ends, status=exits["status"], killed=killed, step=newest_step(run), leaving=leaving)
        history = record_attempt(run, folder, attempt)
        attempt = history[-1]
        decision = decide(
            history,
            max_restarts=plan.restart.max_restarts,
            backoff_seconds=plan.restart.backoff_seconds,
            can_requeue=False,
            go_on=how_to_go_on(folder),
        )
        if decision.action in ("done", "stop"):
            if attempt.ending == "fault":
                write_event(run, "fault", attempt, folder=folder, why=decision.why)
            log = run.logs / f"{process.pid}_{attempt.rank}_log.out"
            status = show_end(attempt.ending, decision.why, log=log)
            return 128 + interruption.signal if interruption.signal and status else status
        write_event(run, "requeued", attempt, folder=folder, why=decision.why)
        print(
            f"{attempt.ending}: {decision.why}; starts again in {decision.delay_seconds} s",
            file=sys.stderr,
            flush=True,
        )
        until = time.monotonic() + decision.delay_seconds
        while time.monotonic() < until and not interruption.signal:
            time.sleep(0.1)
        if interruption.signal:
            show_end("cancelled", f"cancelled before the next start; {how_to_go_on(folder)}", log=None)
            return 128 + interruption.signal
    raise AssertionError("unreachable")


def _start(
    worker: str, args: tuple, *, run: RunDir, plan: Plan, submission: str, attempt: str
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        SUBMISSION: submission,
        ATTEMPT: attempt,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        "CMSCALE_GRACE_SECONDS": str(plan.restart.signal_seconds),
        "CMSCALE_RUN_DIR": str(run.root),
        "CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[: plan.ranks_per_node]) if plan.gpus else "",
    }
    executor = ControlledExecutor(run.logs, environment)
    executor.update_parameters(
        tasks_per_node=plan.ranks_per_node,
        timeout_min=plan.minutes or _NO_LIMIT_MINUTES,
        signal_delay_s=plan.restart.signal_seconds if plan.minutes else 0,
    )
    job = executor.submit(Job(worker, args, run_dir=str(run.root), master_port=free_port()))
    assert isinstance(job, LocalJob)
    assert job._process is not None
    return job._process


def _place(first: dict[str, int]) -> tuple[int, str, str]:
    """(rank, node, how) of the rank that ended badly first."""
    code = first["code"]
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    if code == -signal.SIGKILL:
        how += " (by hand, or the machine ran out of memory: see dmesg)"
    return first["rank"], socket.gethostname(), how


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def refuse_second_launcher(run: RunDir) -> int:
    """Takes the run for this launcher until it ends; returns the lock's descriptor.

    Raises:
        UserError: another launcher on this machine has it.
    """
    import fcntl

    run.logs.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.logs / ".launcher.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run.root}: another launcher is running this run; end it first") from None
    return descriptor
