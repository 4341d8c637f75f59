"""Owns what a Slurm job does after its ranks ended: nothing, back to the queue, another submission, or stop.

Runs in the batch script, after srun. Slurm itself requeues only when it takes nodes away or loses them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from cmscale.runs.folder import RunDir
from launchers.follow import tail
from launchers.outcome import (
    ATTEMPT,
    Decision,
    Ending,
    RankEnd,
    attempt_folder,
    decide,
    how_to_go_on,
    judge,
    newest_step,
    read_json,
    read_rank_ends,
    record_attempt,
    submission_folder,
    write_event,
    write_json,
)

_WAITS = (2, 4, 8, 16, 32, 60)  # seconds between tries: slurmctld may be away for a minute or two
_FIRST_BAD = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<how>.+)")

# srun's word where Slurm limits memory by cgroups, slurmstepd's where it polls, the kernel's through slurmstepd
_NO_MEMORY = "out of memory; ask for more with slurm.mem_gb"
_OUT_OF_MEMORY = re.compile(r"Out Of Memory|[Ee]xceeded (job |step )?memory limit|oom[-_ ]kill")


def main() -> int:
    """The batch script's last command. Returns the job's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--backoff-seconds", type=int, required=True)
    parser.add_argument("--signal-seconds", type=int, required=True)
    flags = parser.parse_args()
    run, job_id = RunDir(flags.run), os.environ["SLURM_JOB_ID"]
    facts = _job_facts(job_id)
    if superseded(facts):
        print(f"{os.environ[ATTEMPT]}: Slurm has started the job again elsewhere; what follows is up to that start")
        return 1
    folder = submission_folder(run)
    ends = read_rank_ends(attempt_folder(run))
    attempt = judge(
        ends,
        status=flags.status,
        killed=killed_rank(run, job_id, ends),
        step=newest_step(run),
        leaving=leaving(facts, signal_seconds=flags.signal_seconds),
    )
    history = record_attempt(run, folder, attempt)
    attempt = history[-1]
    decision = decide(
        history, max_restarts=flags.max_restarts, backoff_seconds=flags.backoff_seconds, go_on=how_to_go_on(folder)
    )
    if not ends and (damaged := damaged_pickle(run, job_id)):
        decision = Decision("stop", damaged)
    print(f"{os.environ[ATTEMPT]}: {attempt.ending}; {decision.action}: {decision.why}", flush=True)
    match decision.action:
        case "requeue":
            write_event(run, "requeued", attempt, folder=folder, why=decision.why)
            if _insist(["scontrol", "requeue", job_id]):
                return 0
            decision = Decision("stop", f"Slurm did not take the job back; {how_to_go_on(folder)}")
        case "restart":
            if _submit_again(run, job_id, decision):
                write_event(run, "requeued", attempt, folder=folder, why=decision.why)
                return 1  # this job failed, whatever becomes of the next
            decision = Decision("stop", f"Slurm did not take the job again after: {decision.why}")
    if attempt.ending in ("fault", "time_limit", "preempted"):  # the last: Slurm did not take it back
        write_event(run, "fault", attempt, folder=folder, why=decision.why)
    write_json(folder / "ending.json", {**asdict(attempt), "why": decision.why})
    return {"finished": 0, "user_error": 2}.get(attempt.ending, 1)


def superseded(facts: dict[str, str]) -> bool:
    """Whether this is an older start of the job: its node was given up as dead, and this script lives on."""
    return int(facts.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def leaving(facts: dict[str, str], *, signal_seconds: int) -> Ending | None:
    """Whether Slurm was ending the job when its ranks ended, from what `scontrol show job` says."""
    state = facts.get("JobState", "")
    if state.startswith(("CANCELLED", "COMPLETING")):
        return "cancelled"
    if state.startswith("TIMEOUT"):
        return "time_limit"
    if facts.get("PreemptTime", "None") not in ("None", "Unknown", "(null)"):
        return "preempted"
    if (left := seconds_left(facts)) is not None and left <= signal_seconds + 60:  # Slurm signals up to 60 s early
        return "time_limit"
    return None


def seconds_left(facts: dict[str, str]) -> float | None:
    try:
        end = time.mktime(time.strptime(facts["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    except (KeyError, ValueError):
        return None
    return end - time.time()


def killed_rank(run: RunDir, job_id: str, ends: list[RankEnd]) -> tuple[int, str, str] | None:
    """(rank, node, how) of the rank that ended badly first; of memory that ran out, the one that took it.

    Where Slurm polls, all ranks of the step are killed at once, and only the log of the greedy one says why.
    """
    killed = first_bad_rank(_own_words(run, job_id))
    if killed and killed[2] == _NO_MEMORY:
        for end in ends:
            if _OUT_OF_MEMORY.search(tail(run.logs / f"{job_id}_{end.rank}_log.out")):
                return end.rank, end.host, _NO_MEMORY
    return killed


def first_bad_rank(words: str) -> tuple[int, str, str] | None:
    """(rank, node, how) of the rank that srun saw ending badly first."""
    found = _FIRST_BAD.search(words)
    if found is None:
        return None
    how = _NO_MEMORY if _OUT_OF_MEMORY.search(words) else found["how"]
    return int(found["rank"]), found["node"], how


def damaged_pickle(run: RunDir, job_id: str) -> str | None:
    """Says so where the job's pickle can't be read, which no restart mends."""
    path = run.logs / f"{job_id}_submitted.pkl"
    try:
        DelayedSubmission.load(path)
    except Exception as error:
        return f"{path}: can't be read ({type(error).__name__}: {error}); submit again with --resume"
    return None


def _own_words(run: RunDir, job_id: str) -> str:
    """What this start's batch script and srun wrote: after the last epilogue's line."""
    path = run.logs / f"{job_id}_batch.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    marker = f"{job_id}.{restart - 1}: "
    return text[text.rfind(marker) + 1 :] if marker in text else text


def _job_facts(job_id: str) -> dict[str, str]:
    shown = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, check=False
    )
    return dict(part.split("=", 1) for part in shown.stdout.split() if "=" in part)


def _insist(command: list[str], *, waits: tuple[int, ...] = _WAITS) -> str | None:
    """What a command of Slurm's says, tried a bounded number of times; None if it never worked."""
    for wait in (*waits, 0):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode == 0:
            return ran.stdout.strip() or "done"
        print(f"{' '.join(command)}: {ran.stderr.strip()}", file=sys.stderr, flush=True)
        time.sleep(wait)
    return None


def _submit_again(run: RunDir, job_id: str, decision: Decision) -> bool:
    """Submits the same script again, later and without the nodes that failed; the job gets another id."""
    exclude = _spare(decision.exclude)
    command = ["sbatch", "--parsable", f"--begin=now+{max(1, decision.delay_seconds)}"]
    command += [f"--exclude={','.join(exclude)}"] if exclude else []
    # What sbatch gave this job, and would take for its options again.
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name not in _KEPT]:
        del os.environ[name]
    said = _insist([*command, str(run.logs / f"{job_id}_submission.sh")])
    if said is None:
        return False
    new_id = said.split(";")[0]
    for name in ("submitted.pkl", "submission.sh"):
        staged = run.logs / f".{new_id}_{name}"
        shutil.copyfile(run.logs / f"{job_id}_{name}", staged)
        staged.replace(run.logs / f"{new_id}_{name}")
    job = submission_folder(run) / "job.json"
    write_json(job, {**(read_json(job) or {}), "job_id": new_id})
    excluded = f", without {', '.join(exclude)}" if exclude else ""
    print(f"submitted again as job {new_id} in {decision.delay_seconds} s{excluded}", flush=True)
    return True


_KEPT = ("SLURM_CONF",)


def _spare(nodes: tuple[str, ...]) -> tuple[str, ...]:
    """The nodes to leave out, if the partition has enough others."""
    if not nodes:
        return ()
    partition, wanted = (
        os.environ.get("SLURM_JOB_PARTITION", ""),
        int(os.environ.get("SLURM_JOB_NUM_NODES", "1")),
    )
    listed = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--responding", f"--partition={partition}", "--format=%N"],
        capture_output=True,
        text=True,
        check=False,
    )
    others = set(listed.stdout.split()) - set(nodes)
    return nodes if len(others) >= wanted else ()


if __name__ == "__main__":
    sys.exit(main())
