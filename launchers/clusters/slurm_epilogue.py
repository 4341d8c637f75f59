"""Ends a start of a Slurm job: nothing more, back to the queue, another submission, or a stop.

The last command of the batch script, after srun. Slurm by itself requeues only jobs whose nodes it takes or loses.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, assert_never

from cmscale.errors import UserError
from cmscale.io import slurm
from cmscale.runs.folder import RunDir
from launchers.decide import Decision, decide, spare_bad_nodes
from launchers.follow import tail
from launchers.judge import Attempt, Ending, RankEnd, RankFailure, judge
from launchers.submission import Submission, newest_step

SLACK_SECONDS = 60
"""Slurm may send the signal before a time limit up to this much earlier than requested."""

_WAITS = (2, 4, 8, 16, 32, 60)  # seconds between tries: slurmctld may be away for a minute or two
_FIRST_FAILURE = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<how>.+)")
_NO_MEMORY = "out of memory; request more with slurm.mem_gb"
# srun's message where Slurm limits memory by cgroups, slurmstepd's where it polls, the kernel's through slurmstepd.
_OUT_OF_MEMORY = re.compile(r"Out Of Memory|[Ee]xceeded (job |step )?memory limit|oom[-_ ]kill")

T = TypeVar("T")


def main(arguments: list[str]) -> int:
    """Judges the start that ended, and does what follows. Returns the exit status of the Slurm job."""
    flags = _parser().parse_args(arguments)
    submission, job_id = Submission(RunDir(flags.run), flags.submission), os.environ["SLURM_JOB_ID"]
    facts = _job_facts(job_id)
    if superseded(facts):
        print(f"{flags.start}: Slurm has started this job again on other nodes; this earlier start does nothing more")
        return 1
    ends = submission.rank_ends(flags.start)
    attempt = judge(
        ends,
        status=flags.status,
        first_failure=first_failure(submission.run, job_id, ends),
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
    print(f"{flags.start}: {history[-1].ending}; {decision.action}: {decision.why}", flush=True)
    return _carry_out(decision, history[-1], submission, job_id)


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


def _carry_out(decision: Decision, attempt: Attempt, submission: Submission, job_id: str) -> int:
    """Does what was decided; a job that Slurm does not take again stops. Returns the exit status of the job."""
    why = decision.why
    match decision.action:
        case "requeue":
            submission.report("requeued", attempt, why=why)
            if _retry(lambda: _requeue(job_id)):
                return 0
            why = f"Slurm did not requeue the job; {submission.how_to_go_on}"
        case "restart":
            if _submit_again(submission, decision):
                submission.report("requeued", attempt, why=why)
                return 1  # this job failed, whatever happens to the next
            why = f"Slurm did not accept the job again after: {why}"
        case "done" | "stop":
            pass
        case _:
            assert_never(decision.action)
    if attempt.ending in ("fault", "time_limit", "preempted"):  # the last: Slurm did not take it again
        submission.report("fault", attempt, why=why)
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
    left = _seconds_left(facts)
    if left is not None and left <= signal_seconds + SLACK_SECONDS:
        return "time_limit"
    return None


def _seconds_left(facts: dict[str, str]) -> float | None:
    try:
        end = time.mktime(time.strptime(facts["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    except (KeyError, ValueError):
        return None
    return end - time.time()


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
    """The rank that srun reports first in a batch log."""
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
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(part.split("=", 1) for part in shown.stdout.split() if "=" in part)


def _requeue(job_id: str) -> bool:
    command = ["scontrol", "requeue", job_id]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(f"{' '.join(command)}: {ran.stderr.strip()}")
    return True


def _retry(action: Callable[[], T], *, waits: Sequence[float] = _WAITS) -> T | None:
    """What an action returns, tried a bounded number of times; None if it always raised UserError.

    Raises:
        NoJobIdError: Slurm has accepted the job: another try would submit it twice.
    """
    for wait in (*waits, None):
        try:
            return action()
        except slurm.NoJobIdError:
            raise
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
        if wait is not None:
            time.sleep(wait)
    return None


def _submit_again(submission: Submission, decision: Decision) -> bool:
    """Submits the same script again: later, without the nodes that failed. The job gets another id."""
    exclude = _spare(decision.exclude)
    options = [f"--begin=now+{max(1, decision.delay_seconds)}"]
    options += [f"--exclude={','.join(exclude)}"] if exclude else []
    try:
        job_id = _retry(lambda: slurm.submit(submission.script, *options, environment=slurm.outside_of_jobs()))
    except slurm.NoJobIdError as error:
        print(error, file=sys.stderr, flush=True)
        return True
    if job_id is None:
        return False
    submission.replace_job_id(job_id)
    excluded = f", without {', '.join(exclude)}" if exclude else ""
    print(f"submitted again as job {job_id} in {decision.delay_seconds} s{excluded}", flush=True)
    return True


def _spare(bad: Sequence[str]) -> tuple[str, ...]:
    """The bad nodes, if the partition has enough others."""
    if not bad:
        return ()
    partition, wanted = os.environ.get("SLURM_JOB_PARTITION", ""), int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    command = ["sinfo", "--noheader", "--Node", "--responding", f"--partition={partition}", "--format=%N"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return spare_bad_nodes(bad, listed.stdout.split(), wanted=wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
