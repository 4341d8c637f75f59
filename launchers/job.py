"""Runs one rank of a job: `python -P -u -m launchers.job CLUSTER RUN SUBMISSION START`, the command of every rank."""

import argparse
import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from cmscale.commands.ending import hide_warnings_of_pillow
from cmscale.errors import NoSpace, NotExported, UserError
from cmscale.io.process import CHECKOUT, START, exit_at_once, node_name, note_early_signals
from cmscale.io.remarks import say
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import read_code
from launchers.clusters import CLUSTERS
from launchers.jobs import load_worker
from launchers.judge import RankEnd, RankState
from launchers.placement import RankPlace
from launchers.provenance import record_start
from launchers.submission import JobRecord, Submission


def main(arguments: list[str]) -> NoReturn:
    """Runs the worker of a submission as one rank, and reports how it ended. Ends the process."""
    note_early_signals()
    hide_warnings_of_pillow()
    parser = argparse.ArgumentParser(prog="launchers.job", description=__doc__)
    parser.add_argument("cluster", choices=list(CLUSTERS))
    parser.add_argument("run", type=Path)
    parser.add_argument("submission")
    parser.add_argument("start")
    flags = parser.parse_args(arguments)
    submission = Submission(RunDir(flags.run), flags.submission)
    place = CLUSTERS[flags.cluster].enter_rank()
    set_rank_environment(place)
    os.environ[START] = f"{submission.name}/{flags.start}"

    def report(end: RankState, message: str = "") -> None:
        try:
            submission.write_rank_end(flags.start, RankEnd(place.rank, node_name(), end, message))
        except (OSError, UserError) as error:  # a full disk: the log still says how the rank ended
            say(f"rank {place.rank} can't report its end ({end}): {error}", to="stderr")

    report("running")
    if submission.has_moved_on(os.environ.get("SLURM_JOB_ID")):  # Slurm requeued a job that was submitted anew, too
        report("superseded")
        say("a later job carries this submission on; this one does nothing")
        exit_at_once(0)
    try:
        job = submission.read_job()
        check_code(job)
        if place.rank == 0:
            record_code(submission, flags.start, job)
            record_job_id(submission, job)
        end = load_worker(job.worker)(*job.arguments)
    except UserError as error:
        is_full = isinstance(error, NoSpace)
        report("no_space" if is_full else "user_error", "; ".join(error.args))
        for line in error.args:
            say(f"error: {line}", to="stderr")
        exit_at_once(1 if is_full else 2)
    except NotExported as error:
        report("not_exported", str(error))
        say(f"finished, not exported: {error}", to="stderr")
        exit_at_once(0)  # all work is done: the cluster must not see a rank that failed
    except Exception as error:
        report("fault", " ".join(f"{type(error).__name__}: {error}".split()))
        traceback.print_exc()
        say(f"rank {place.rank} on {node_name()} failed", to="stderr")
        exit_at_once(1)
    match end:
        case "finished" | "preempted" | "superseded":
            report(end)
        case _:
            raise AssertionError(f"{job.worker} returned {end!r}")
    exit_at_once(0)


def check_code(job: JobRecord) -> None:
    """Checks that this process runs the code that was submitted.

    Raises:
        UserError: another folder comes first on Python's path.
    """
    if job.code is not None and Path(job.code).resolve() != CHECKOUT:
        raise UserError(
            f"this rank imports cmscale from {CHECKOUT}, but {job.code} was submitted; "
            "let nothing that runs on the node put another folder before it in PYTHONPATH"
        )


def record_code(submission: Submission, start: str, job: JobRecord) -> None:
    """Adds this start to provenance.json; a start that can't be recorded goes on."""
    try:
        facts: dict[str, Any] = {"worker": job.worker, "submission": submission.name, "start": start}
        record_start(submission.run, read_code(), CHECKOUT, **facts)
    except (OSError, UserError) as error:
        say(f"this start is not in {submission.run.provenance.name}: {error}", to="stderr")


def record_job_id(submission: Submission, job: JobRecord) -> None:
    """Records the id of a Slurm job that its launcher never learned, as Slurm had given no answer to sbatch.

    A start that can't record it goes on.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id and job.job_id is None and submission.script.exists():
        with contextlib.suppress(OSError, UserError):
            submission.replace_job_id(job_id)


def set_rank_environment(place: RankPlace) -> None:
    """Sets the variables by which torch.distributed finds ranks, and OMP_NUM_THREADS unless it is set already."""
    cpus = os.environ.get("SLURM_CPUS_PER_TASK") or str(max(1, len(os.sched_getaffinity(0)) // place.ranks_per_node))
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.num_ranks),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.ranks_per_node),
        MASTER_ADDR=place.master_address,
        MASTER_PORT=str(place.master_port),
    )
    os.environ.setdefault("OMP_NUM_THREADS", cpus)


if __name__ == "__main__":
    main(sys.argv[1:])
