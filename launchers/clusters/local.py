"""Runs jobs on this machine: starts a controller of their ranks, restarts it after faults, and ends with it."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import submitit

from cmscale.errors import UserError
from cmscale.io.process import die_with_parent, node_name
from cmscale.io.remarks import say
from cmscale.runs.folder import RunDir
from launchers.decide import decide, in_words
from launchers.evaluate_checkpoints import evaluating
from launchers.follow import Follower, show_end
from launchers.jobs import JobSpec
from launchers.judge import Attempt, RankFailure, judge
from launchers.placement import Placement, PlacementRequest, RankPlace, visible_gpus
from launchers.submission import Submission, newest_step

_NO_LIMIT_MINUTES = 10 * 366 * 24 * 60
_POLL_SECONDS = 0.1


class LocalMachine:
    """This machine, one node."""

    name = "local"

    def suits(self, request: PlacementRequest) -> bool:  # noqa: ARG002
        return True

    def place(self, request: PlacementRequest) -> Placement:
        if request.nodes > 1:
            raise UserError(
                f"--nodes {request.nodes}: this machine is one node (no sbatch on the PATH, or --cluster local)"
            )
        gpus = 0 if request.device == "cpu" else len(visible_gpus())
        if request.device == "cuda" and gpus == 0:
            raise UserError(
                f"{request.device_option}cuda: this machine has no CUDA device; use {request.device_option}cpu"
            )
        if gpus and (request.ranks_per_node or 1) > gpus:
            raise UserError(f"--gpus-per-node {request.ranks_per_node}: this machine has {gpus} GPUs")
        ranks = request.ranks_per_node or gpus or 1
        return Placement(self.name, 1, ranks, gpus > 0, None, request.minutes, request.slurm, request.restart)

    def describe(self, placement: Placement) -> str:  # noqa: ARG002
        return "this machine"

    def preview(self, job: JobSpec) -> str:  # noqa: ARG002
        return ""

    def refuse_if_running(self, run: RunDir, worker: str) -> None:
        """Does nothing: jobs here live as long as their launcher, which holds the run's lock."""

    def run(self, job: JobSpec, *, wait: bool) -> int:  # noqa: ARG002
        """Runs a job to its end, whatever `wait` is. 128 + a signal is the status if that ended the launcher."""
        job.taken()
        with evaluating(job.evaluations, python_path=job.python_path) as finish:
            status, is_done = _run_to_end(job)
            if is_done:
                finish()
        return status

    def enter_rank(self) -> RankPlace:
        die_with_parent(signal.SIGKILL)  # no rank outlives its controller
        environment = submitit.JobEnvironment()
        return RankPlace(
            rank=environment.global_rank,
            num_ranks=environment.num_tasks,
            local_rank=environment.local_rank,
            ranks_per_node=environment.num_tasks,
            master_address="127.0.0.1",
            master_port=int(os.environ["MASTER_PORT"]),
        )


class Interruption:
    """Ctrl-C, SIGTERM or a lost terminal: the first requests the ranks to save and end, the second kills them."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if self.process is None or self.process.poll() is not None:
            return
        if again:
            _end_group(self.process)
        else:
            self.process.terminate()
            say("stopping: the ranks save and end; repeat to end them at once", to="stderr")


@contextlib.contextmanager
def _interruptible() -> Iterator[Interruption]:
    interruption = Interruption()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, interruption.handle) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run_to_end(job: JobSpec) -> tuple[int, bool]:
    """The launcher's exit status, and whether the job has done all its work."""
    submission = Submission(job.run, job.submission)
    submission.write_job(job.worker, job.arguments, code=job.code)
    with _interruptible() as interruption:
        for number in itertools.count():
            ended = _run_once(job, submission, f"attempt-{number}", interruption)
            if ended is not None:
                return ended
    raise AssertionError("unreachable")


def _run_once(job: JobSpec, submission: Submission, start: str, interruption: Interruption) -> tuple[int, bool] | None:
    """Runs one start of a job, and the pause after it. Returns what `_run_to_end` does; None if it starts again."""
    began = time.monotonic()
    process = interruption.process = _start_controller(job, submission, start)
    if interruption.signal:  # it came before there was a process to pass it to
        process.terminate()
    told = _follow(process, job.run.logs / f"{process.pid}_0_log.out")
    _end_group(process)
    minutes, restart = job.placement.minutes, job.placement.restart
    timed_out = minutes is not None and time.monotonic() - began >= minutes * 60 - restart.signal_seconds
    attempt = _judged(submission, start, cancelled=interruption.signal is not None, timed_out=timed_out)
    history = submission.record(attempt)
    attempt = history[-1]
    decision = decide(
        history,
        max_restarts=restart.max_restarts,
        backoff_seconds=restart.backoff_seconds,
        can_requeue=False,
        go_on=submission.how_to_go_on,
    )
    if decision.action in ("done", "stop"):
        if attempt.ending == "fault":
            submission.report("fault", attempt, why=decision.why)
        submission.end(attempt, why=decision.why)
        log = job.run.logs / f"{process.pid}_{attempt.rank}_log.out"
        status = show_end(attempt.ending, decision.why, log=log, told=told)
        status = 128 + interruption.signal if interruption.signal and status else status
        return status, attempt.ending in ("finished", "not_exported")
    submission.report("requeued", attempt, why=decision.why)
    again = f"starts again in {decision.delay_seconds} s"
    say(f"{in_words(attempt, decision)}; {again}", to="stderr")
    until = time.monotonic() + decision.delay_seconds
    while time.monotonic() < until and not interruption.signal:
        time.sleep(_POLL_SECONDS)
    if interruption.signal:
        why = f"cancelled before the next start; {submission.how_to_go_on}"
        submission.end(replace(attempt, ending="cancelled"), why=why)
        show_end("cancelled", why, log=None)
        return 128 + interruption.signal, False
    return None


def _start_controller(job: JobSpec, submission: Submission, start: str) -> subprocess.Popen[bytes]:
    placement, signal_seconds = job.placement, job.placement.restart.signal_seconds
    environment = {
        **os.environ,
        "PYTHONPATH": job.python_path,
        "CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[: placement.ranks_per_node]) if placement.gpus else "",
        "MASTER_PORT": str(_free_port()),
    }
    limits = {
        "--num-ranks": placement.ranks_per_node,
        "--grace-seconds": signal_seconds,
        "--time-limit-seconds": 60 * (placement.minutes or _NO_LIMIT_MINUTES),
        "--signal-seconds": signal_seconds,
    }
    command = [sys.executable, "-P", "-m", "launchers.clusters.local_controller"]
    command += [str(job.run.root), submission.name, start]
    command += [str(part) for limit in limits.items() for part in limit]
    # A session of its own: Ctrl-C reaches the launcher alone, which ends the ranks in order.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _follow(process: subprocess.Popen[bytes], log: Path) -> list[str]:
    """Shows a log until a process has ended. Returns what it has told of the end: see `Follower`."""
    follower = Follower()
    while process.poll() is None:
        follower.show(log)
        time.sleep(_POLL_SECONDS)
    follower.show(log)
    follower.close()
    return follower.told


def _judged(submission: Submission, start: str, *, cancelled: bool, timed_out: bool) -> Attempt:
    exits = submission.exits(start) or {"first": None, "status": 1}
    return judge(
        submission.rank_ends(start),
        status=exits["status"],
        first_failure=submission.explained(start, _first_failure(exits["first"])) if exits["first"] else None,
        step=newest_step(submission.run),
        leaving="cancelled" if cancelled else "time_limit" if timed_out else None,
    )


def _first_failure(first: dict[str, int]) -> RankFailure:
    code = first["code"]
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    if code == -signal.SIGKILL:
        how += " (by hand, or the machine ran out of memory: see dmesg)"
    return RankFailure(first["rank"], node_name(), how)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the controller and everything that its ranks left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
