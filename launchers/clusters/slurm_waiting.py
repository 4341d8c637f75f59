"""Waits for a job in Slurm: shows rank 0's log, why the job waits in the queue, and how it ended."""

import os
import time
from contextlib import suppress
from pathlib import Path

from cmscale.io import slurm_jobs
from cmscale.io.remarks import say
from launchers.follow import Follower, show_end
from launchers.judge import Ending
from launchers.submission import Submission, read_json

POLL_SECONDS = 1.0
LONGEST_SILENCE_SECONDS = 600.0
REASON_SECONDS = 60.0  # between two looks for why a job waits in the queue
CANCELLED_SECONDS = 2.0  # for the epilogue of a job that was cancelled; of one that had not begun there is none
SETTLE_SECONDS = 60.0  # until a file of another node is seen here: NFS may remember for so long that there was none

# The epilogue should have written how the job ended once it is in one of these states, or unknown to Slurm.
_OVER = {"CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


def wait_for_end(submission: Submission) -> int:
    """Shows rank 0's log until the job has ended for good; Ctrl-C ends the waiting and not the job.

    Returns:
        The exit status of the job: 0, 1 or 2; 130 after Ctrl-C.
    """
    follower = Follower()
    try:
        ending, why, log = _follow_to_end(submission, follower)
    except KeyboardInterrupt:
        follower.close()
        job_id = (read_json(submission.job_file) or {}).get("job_id", "JOB")
        cancel = " ".join(slurm_jobs.cancel_command(job_id, slurm_jobs.clusters_of(submission.script)))
        say(f"\nno longer waiting; the job goes on; to end it: {cancel}", to="stderr")
        return 130
    finally:
        follower.close()  # first: beside a bar, lines are broken at the terminal's width
    return show_end(ending, why, log=log, told=follower.told)


def _follow_to_end(submission: Submission, follower: Follower) -> tuple[Ending, str, Path]:
    """Shows rank 0's log. Returns how the job ended, why, and the log of the rank that it ended by."""
    logs, silent_since = submission.run.logs, None
    clusters = slurm_jobs.clusters_of(submission.script)
    queue = _Queue(clusters)
    job_id = "unknown"  # until a record that can be read names it
    while True:
        job_id = (read_json(submission.job_file) or {}).get("job_id", job_id)
        log = logs / f"{job_id}_0_log.out"
        states = slurm_jobs.job_states(job_id, clusters) if job_id.isdecimal() else None
        follower.show(log)
        if ending := read_json(submission.ending_file):
            rank_log = logs / f"{job_id}_{ending['rank']}_log.out"
            return ending["ending"], ending["why"], rank_log if rank_log.exists() else log
        silent_since = (silent_since or time.monotonic()) if states is None else None
        if silent_since is not None and time.monotonic() - silent_since > LONGEST_SILENCE_SECONDS:
            return "fault", f"Slurm does not answer about job {job_id}", log
        if states is not None and (not states or states.keys() & _OVER) and not _goes_on(submission, job_id, states):
            how = next(iter(states)).lower() if states else "Slurm no longer knows it, and it reported no end"
            return "cancelled", f"job {job_id}: {how}; {submission.how_to_go_on}", log
        if states is not None and (reason := slurm_jobs.reason_to_wait(states)) is not None:
            queue.show(job_id, reason)
        time.sleep(POLL_SECONDS)


def _goes_on(submission: Submission, job_id: str, states: slurm_jobs.States) -> bool:
    """Whether a job that is over has said how it ended, or is another job now; its epilogue may still be writing so."""
    until = time.monotonic() + (CANCELLED_SECONDS if "CANCELLED" in states else SETTLE_SECONDS)
    while True:
        with suppress(OSError):  # listing a folder renews what NFS knows of it
            os.listdir(submission.folder)  # noqa: PTH208
        if submission.ending_file.exists():
            return True
        if (read_json(submission.job_file) or {}).get("job_id", job_id) != job_id:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)


class _Queue:
    """Says why a job waits in the queue, once it has for a minute, and again when the reason is another."""

    def __init__(self, clusters: str | None) -> None:
        self._clusters = clusters
        self._looks_at = time.monotonic() + REASON_SECONDS
        self._said = ""

    def show(self, job_id: str, reason: str) -> None:
        if time.monotonic() < self._looks_at:
            return
        self._looks_at = time.monotonic() + REASON_SECONDS
        said = f"job {job_id} waits in the queue: {slurm_jobs.why_it_waits(job_id, reason, self._clusters)}"
        if said != self._said:
            say(said)
        self._said = said
