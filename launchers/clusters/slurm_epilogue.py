"""Ends a start of a Slurm job: nothing more, back to the queue, another submission, or a stop.

The last command of the batch script, after srun. Slurm by itself requeues only jobs whose nodes it takes or loses.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from cmscale.errors import UserError
from cmscale.io.remarks import say
from cmscale.runs.folder import RunDir
from launchers.clusters.slurm_again import REQUEUED, Again, requeue, submit_again, waits_within
from launchers.decide import Decision, decide, in_words
from launchers.follow import tail
from launchers.judge import Attempt, Ending, RankEnd, RankFailure, judge
from launchers.submission import Submission, newest_step

SLACK_SECONDS = 60
"""Slurm may send the signal before a time limit up to this much earlier than requested."""

FOLDER_PATIENCE_SECONDS = 120
"""How long a run's folder may be away from this node, as while its file system is mounted anew."""

_DURATION = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
_KILL_WAIT_SECONDS = 20.0  # Slurm's KillWait, 30 by default, less what has passed of it
_FIRST_FAILURE = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<how>.+)")
_NOT_LAUNCHED = re.compile(r"srun: error: Task launch for \S+ failed on node (?P<node>[^\s:]+): (?P<how>.+)")
_NO_MEMORY = "out of memory; request more with slurm.mem_gb"
# srun's message where Slurm limits memory by cgroups, slurmstepd's where it polls, the kernel's through slurmstepd.
_OUT_OF_MEMORY = re.compile(r"Out Of Memory|[Ee]xceeded (job |step )?memory limit|oom[-_ ]kill")


def main(arguments: list[str]) -> int:
    """Judges the start that ended, and does what follows. Returns the exit status of the Slurm job."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue ends this script: it records what it did first
    try:
        return _end_start(_parser().parse_args(arguments))
    except UserError as error:  # a full disk: what can't be recorded is not started again
        say(f"error: {error}; then continue with --resume", to="stderr")
        return 1


def _end_start(flags: argparse.Namespace) -> int:
    submission, job_id = Submission(RunDir(flags.run), flags.submission), os.environ["SLURM_JOB_ID"]
    facts = _job_facts(job_id)
    facts_now = _job_facts(job_id) if _waited_for_folder(submission) else facts
    if superseded(facts_now):
        say(f"{flags.start}: Slurm has started this job again on other nodes; this earlier start does nothing more")
        return 1
    ends = submission.rank_ends(flags.start)
    attempt = judge(
        ends,
        status=flags.status,
        first_failure=submission.explained(flags.start, first_failure(submission.run, job_id, ends)),
        step=newest_step(submission.run),
        leaving=leaving(facts, signal_seconds=flags.signal_seconds),
    )
    history = submission.record(attempt)
    decision = decide(
        history,
        max_restarts=flags.max_restarts,
        backoff_seconds=flags.backoff_seconds,
        can_requeue=True,
        go_on=submission.how_to_go_on,
    )
    follows = "" if decision.action == "done" else f"{decision.action}: "
    say(f"{flags.start}: {follows}{in_words(history[-1], decision)}")
    again = _start_again(decision, submission, job_id, seconds_left=seconds_left(facts_now))
    return _report(decision, again, history[-1], submission, job_id)


def _waited_for_folder(submission: Submission) -> bool:
    """Whether it had to be waited for the run's folder, in which all is written; none is made in its place.

    Raises:
        UserError: it is gone.
    """
    until, waited = time.monotonic() + FOLDER_PATIENCE_SECONDS, False
    while True:
        with contextlib.suppress(OSError):
            if submission.folder.is_dir():
                return waited
        waited = True
        if time.monotonic() >= until:
            raise UserError(f"{submission.run.root}: gone from this node (moved, removed or not mounted); find it")
        time.sleep(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launchers.clusters.slurm_epilogue", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("submission")
    parser.add_argument("start", help="name of the start that ended: JOBID.RESTARTS")
    parser.add_argument("--status", type=int, required=True, help="srun's exit status")
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--backoff-seconds", type=int, required=True)
    parser.add_argument("--signal-seconds", type=int, required=True)
    return parser


def _start_again(
    decision: Decision, submission: Submission, job_id: str, *, seconds_left: float | None
) -> Again | None:
    """Starts the job again if that was decided. None if it was not, or if Slurm does not take the job again."""
    waits = waits_within(seconds_left)
    match decision.action:
        case "requeue":
            return requeue(submission, job_id, waits=waits)
        case "restart":
            return submit_again(submission, delay_seconds=decision.delay_seconds, exclude=decision.exclude, waits=waits)
        case "done" | "stop":
            return None
        case _:
            assert_never(decision.action)


def _report(decision: Decision, again: Again | None, attempt: Attempt, submission: Submission, job_id: str) -> int:
    """Records what was done, after the deed. Returns the exit status of the job."""
    why = decision.why
    if again is not None:
        submission.report("requeued", attempt, why=why if again == REQUEUED else f"{why}; {again.how}")
        return int(decision.action == "restart")  # that job failed, whatever happens to the next
    if decision.action == "requeue":
        why = f"Slurm did not requeue the job; {submission.how_to_go_on}"
    elif decision.action == "restart":
        why = f"Slurm did not accept the job again after: {why}"
    if attempt.ending in ("fault", "time_limit", "preempted"):  # the last: Slurm did not take it again
        submission.report("fault", attempt, why=why)
    if not submission.has_moved_on(job_id):
        submission.end(attempt, why=why)
    return {"finished": 0, "user_error": 2}.get(attempt.ending, 1)


def superseded(facts: dict[str, str]) -> bool:
    """Whether Slurm gave this start's node up as dead and started the job again, while this script went on."""
    return int(facts.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def leaving(facts: dict[str, str], *, signal_seconds: int) -> Ending | None:
    """Why Slurm was ending the job when its ranks ended, from what `scontrol show job` prints; None if it was not."""
    state = facts.get("JobState", "")
    if state.startswith(("CANCELLED", "COMPLETING")):
        return "cancelled"
    if state.startswith("TIMEOUT"):
        return "time_limit"
    if facts.get("PreemptTime", "None") not in ("None", "Unknown", "(null)"):
        return "preempted"
    left = _seconds_to_end(facts)
    if left is not None and left <= signal_seconds + SLACK_SECONDS:
        return "time_limit"
    return None


def seconds_left(facts: dict[str, str]) -> float | None:
    """The time until Slurm kills this script; None if neither slurmctld nor the environment tells."""
    left = _seconds_to_end(facts)
    is_ending = facts.get("JobState", "RUNNING") != "RUNNING" or (left is not None and left <= 0)
    return _KILL_WAIT_SECONDS if is_ending else left


def _seconds_to_end(facts: dict[str, str]) -> float | None:
    """The time until the job's limit, as slurmctld sees it, else as it was when the job started.

    The clock of this node may differ from slurmctld's, and SLURM_TIME_FORMAT may change how it prints times: what it
    prints of durations is right all the same.
    """
    limit, passed = (_seconds(facts.get(name, "")) for name in ("TimeLimit", "RunTime"))
    if limit is not None and passed is not None:
        return limit - passed
    at_start = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(at_start) - time.time() if at_start.isdecimal() and "TimeLimit" not in facts else None


def _seconds(duration: str) -> float | None:
    """A duration as Slurm prints it, `[days-]hours:minutes:seconds`, in seconds; None for one without an end."""
    found = _DURATION.fullmatch(duration)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 60.0 * (60 * (24 * days + hours) + minutes) + seconds


def first_failure(run: RunDir, job_id: str, ends: Sequence[RankEnd]) -> RankFailure | None:
    """The rank that failed first; if memory ran out, the one that used it.

    Where Slurm polls memory, all ranks of the step are killed at once, and only the log of the one that exceeded the
    limit says why.
    """
    failure = parse_first_failure(_batch_log(run, job_id))
    if failure and failure.how == _NO_MEMORY:
        for end in ends:
            if _OUT_OF_MEMORY.search(tail(run.logs / f"{job_id}_{end.rank}_log.out")):
                return RankFailure(end.rank, end.host, _NO_MEMORY)
    return failure


def parse_first_failure(log: str) -> RankFailure | None:
    """The rank that srun reports first in a batch log; rather a node where it could start none, if there is one."""
    if launch := _NOT_LAUNCHED.search(log):
        return RankFailure(None, launch["node"], launch["how"])
    found = _FIRST_FAILURE.search(log)
    if found is None:
        return None
    how = _NO_MEMORY if _OUT_OF_MEMORY.search(log) else found["how"]
    return RankFailure(int(found["rank"]), found["node"], how)


def _batch_log(run: RunDir, job_id: str) -> str:
    """What this start's batch script and srun printed: everything after the last line of the epilogue before."""
    path = run.logs / f"{job_id}_batch.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    marker = f"{job_id}.{restart - 1}: "
    return text[text.rfind(marker) + 1 :] if marker in text else text


def _job_facts(job_id: str) -> dict[str, str]:
    """What scontrol prints about a job, by name; empty if there is no scontrol, or slurmctld does not answer."""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        say(f"{' '.join(command)}: {error}", to="stderr")
        return {}
    facts: dict[str, str] = {}
    for part in shown.stdout.split():
        name, _, value = part.partition("=")
        facts.setdefault(name, value)  # a comment or a path with spaces, which come later, may hold anything
    return facts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
