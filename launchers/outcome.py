"""Owns how a job ended: what each rank says of itself, and what follows (done, requeue, restart, stop)."""

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cmscale.io.storage import replace_durably
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, step_of

SUBMISSION = "CMSCALE_SUBMISSION"  # one name for all starts of one submission
ATTEMPT = "CMSCALE_ATTEMPT"  # one name for each start
MAX_FAULTS_WITHOUT_PROGRESS = 3
LONGEST_BACKOFF_SECONDS = 300
# The worker whose jobs stand beside a run's training and are not its end.
EVALUATION = "cmscale.evaluation.evaluate:main"

Ending = Literal["finished", "preempted", "time_limit", "cancelled", "user_error", "fault"]
Action = Literal["done", "requeue", "restart", "stop"]


@dataclass(frozen=True)
class RankEnd:
    """One rank of one start: running, or how it ended. A rank that was killed stays `running`."""

    rank: int
    host: str
    end: Literal["running", "finished", "preempted", "user_error", "fault"]
    message: str = ""


@dataclass(frozen=True)
class Attempt:
    """One start of a job, ended: how, why, and the newest checkpoint's step (-1: none).

    `measured` is, of an evaluation, what all evaluations of its run had on disk by then: two starts that say the same
    brought nothing between them.
    """

    ending: Ending
    message: str
    step: int
    rank: int = 0
    node: str = ""
    measured: str = ""


@dataclass(frozen=True)
class Decision:
    action: Action
    why: str
    delay_seconds: int = 0
    exclude: tuple[str, ...] = ()


def submission_folder(run: RunDir, submission: str | None = None) -> Path:
    """The files of one submission: a folder for each start, `attempts.jsonl`, `job.json`, `ending.json`."""
    return run.logs / "submissions" / (submission or os.environ[SUBMISSION])


def begin_submission(run: RunDir, submission: str, *, worker: str) -> Path:
    """Makes the submission's folder, which says whose job it is."""
    folder = submission_folder(run, submission)
    write_json(folder / "job.json", {"worker": worker})
    return folder


def is_evaluation(folder: Path) -> bool:
    """Whether a submission's job evaluates."""
    return (read_json(folder / "job.json") or {}).get("worker") == EVALUATION


def how_to_go_on(folder: Path) -> str:
    """What a user does to go on with a submission's job after it was stopped."""
    return "the same command goes on where it was" if is_evaluation(folder) else "continue with --resume"


def measured_so_far(run: RunDir) -> str:
    """What the evaluations of a run have on disk."""
    # Not by globs, which fail where another evaluation of the run removes its blocks meanwhile.
    names = [name for _, _, files in os.walk(run.evaluation_progress) for name in files]
    sets, blocks = sum(name.endswith(".json") for name in names), sum(name.startswith("block-") for name in names)
    return f"{sets} sets and {blocks} blocks of samples"


def attempt_folder(run: RunDir) -> Path:
    return submission_folder(run) / os.environ[ATTEMPT]


def write_rank_end(folder: Path, end: RankEnd) -> None:
    write_json(folder / f"rank-{end.rank:04d}.json", asdict(end))


def read_rank_ends(folder: Path) -> list[RankEnd]:
    """What the ranks of a start said, in the order of their last words."""
    files = sorted(folder.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [RankEnd(**json.loads(path.read_text())) for path in files]


def newest_step(run: RunDir) -> int:
    """The step of the newest complete checkpoint in the run's folder; -1 where there is none."""
    manifests = run.checkpoints.glob(f"step-*/{CHECKPOINT_MANIFEST}")
    return max((step_of(path.parent.name) for path in manifests), default=-1)


def judge(
    ends: list[RankEnd],
    *,
    status: int,
    killed: tuple[int, str, str] | None,
    step: int,
    leaving: Ending | None,
) -> Attempt:
    """How a start ended.

    Args:
        ends: what its ranks said, earliest first.
        status: the exit status of all of it (srun's, or the worst rank's).
        killed: (rank, node, how) of the first rank that ended badly, as the launcher saw it.
        step: the newest checkpoint's.
        leaving: `preempted`, `time_limit` or `cancelled` where the cluster was ending the job anyway.
    """
    by_end = {end.end: end for end in reversed(ends)}
    by_rank = {end.rank: end for end in ends}
    if wrong := by_end.get("user_error"):
        return Attempt("user_error", wrong.message, step, wrong.rank, wrong.host)
    if status == 0 and ends and all(end.end == "finished" for end in ends):
        return Attempt("finished", "", step)
    if leaving:  # before faults: ranks whose peers are being killed report all sorts of things
        return Attempt(leaving, f"newest checkpoint: step {step}" if step >= 0 else "no checkpoint yet", step)
    wrong = by_end.get("fault")
    if killed:
        rank, node, how = killed
        own = by_rank.get(rank)
        if own is None or own.end != "fault":  # it had no time for a word; what its peers say follows from that
            return Attempt("fault", f"rank {rank} on {node}: {how}", step, rank, node)
        wrong = own
    if wrong:
        return Attempt("fault", wrong.message, step, wrong.rank, wrong.host)
    if status == 0 and ends and all(end.end in ("finished", "preempted") for end in ends):
        return Attempt("preempted", "", step)
    return Attempt("fault", f"the job's processes ended with status {status} and without a word", step)


def decide(
    history: list[Attempt],
    *,
    max_restarts: int,
    backoff_seconds: int = 10,
    can_requeue: bool = True,
    go_on: str = "continue with --resume",
) -> Decision:
    """What to do after the last of the starts in `history`. Preemptions and time limits spend no restart.

    Args:
        backoff_seconds: before the first restart; doubled while nothing moves.
        can_requeue: whether there is a queue to go back to after a time limit (Slurm).
        go_on: what a user does after a stop; see `how_to_go_on`.
    """
    last = history[-1]
    match last.ending:
        case "finished":
            return Decision("done", "finished")
        case "user_error":
            return Decision("stop", last.message)
        case "cancelled":
            return Decision("stop", f"cancelled; {last.message}; {go_on}")
        case "time_limit" if not can_requeue:
            return Decision("stop", f"time limit reached; {last.message}; {go_on}")
        case "time_limit" if _without_progress(history) >= MAX_FAULTS_WITHOUT_PROGRESS:
            return Decision(
                "stop", f"no progress before the time limit, three times; {last.message}; ask for more --time"
            )
        case "time_limit" | "preempted":
            return Decision("requeue", f"{last.ending.replace('_', ' ')}; {last.message or f'step {last.step}'}")
    faults = [attempt for attempt in history if attempt.ending == "fault"]
    row = _without_progress(faults)
    if row >= MAX_FAULTS_WITHOUT_PROGRESS:
        since = last.measured or f"step {max(last.step, 0)}"
        return Decision(
            "stop",
            f"{row} failures without progress since {since}: {last.message}",
        )
    if len(faults) > max_restarts:
        return Decision("stop", f"failed {len(faults)} times (restart.max_restarts {max_restarts}): {last.message}")
    delay = min(backoff_seconds * 2 ** (row - 1), LONGEST_BACKOFF_SECONDS)
    return Decision("restart", last.message, delay, _bad_nodes(faults))


def _without_progress(attempts: list[Attempt]) -> int:
    """How many of the last attempts ended where the last one did."""
    count = 0
    for attempt in reversed(attempts):
        if (attempt.step, attempt.measured) != (attempts[-1].step, attempts[-1].measured):
            break
        count += 1
    return count


def _bad_nodes(faults: list[Attempt]) -> tuple[str, ...]:
    """Nodes on which two starts failed first; one failure may be anybody's."""
    nodes = [fault.node for fault in faults if fault.node]
    return tuple(sorted({node for node in nodes if nodes.count(node) >= 2}))


def write_json(path: Path, value: dict[str, Any]) -> None:
    replace_durably(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(path.read_text())
    return None


def append_json(path: Path, record: dict[str, Any]) -> None:
    """One line, in one write, durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_attempt(run: RunDir, folder: Path, attempt: Attempt) -> list[Attempt]:
    """Adds a start to the submission's history and gives all of it."""
    if is_evaluation(folder):
        measured = measured_so_far(run)
        words = measured if attempt.ending in ("preempted", "time_limit", "cancelled") else attempt.message
        attempt = replace(attempt, measured=measured, message=words)
    append_json(folder / "attempts.jsonl", asdict(attempt))
    lines = (folder / "attempts.jsonl").read_text().splitlines()
    return [Attempt(**json.loads(line)) for line in lines]


def write_event(run: RunDir, event: str, attempt: Attempt, *, folder: Path, why: str) -> None:
    """A line of the launcher's in events.jsonl, in the form that the run's own lines have.

    An evaluation's are called `evaluation_fault`, `evaluation_requeued`: how it ends says nothing of the training.
    """
    line = {
        "time": time.time(),
        "event": f"evaluation_{event}" if is_evaluation(folder) else event,
        "step": max(attempt.step, 0),
        "rank": attempt.rank,
        "why": why,
    }
    append_json(run.events, line)
