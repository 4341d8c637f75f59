"""Runs one rank of a job: `python -u -m launchers.job CLUSTER RUN SUBMISSION START`, the command of every rank."""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from cmscale.errors import UserError
from cmscale.io.process import START, exit_at_once, node_name, note_early_signals
from cmscale.runs.folder import RunDir
from launchers.clusters import CLUSTERS
from launchers.jobs import load_worker
from launchers.judge import RankEnd, RankState
from launchers.placement import RankPlace
from launchers.submission import Submission


def main(arguments: list[str]) -> NoReturn:
    """Runs the worker of a submission as one rank, and reports how it ended. Ends the process."""
    note_early_signals()
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
        submission.write_rank_end(flags.start, RankEnd(place.rank, node_name(), end, message))

    report("running")
    if submission.has_moved_on(os.environ.get("SLURM_JOB_ID")):  # Slurm requeued a job that was submitted anew, too
        report("superseded")
        print("a later job carries this submission on; this one does nothing", flush=True)
        exit_at_once(0)
    try:
        job = submission.read_job()
        end = load_worker(job.worker)(*job.arguments)
    except UserError as error:
        report("user_error", str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
        exit_at_once(2)
    except Exception as error:
        report("fault", " ".join(f"{type(error).__name__}: {error}".split()))
        traceback.print_exc()
        print(f"rank {place.rank} on {node_name()} failed", file=sys.stderr, flush=True)
        exit_at_once(1)
    match end:
        case "finished" | "preempted" | "superseded":
            report(end)
        case _:
            raise AssertionError(f"{job.worker} returned {end!r}")
    exit_at_once(0)


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
