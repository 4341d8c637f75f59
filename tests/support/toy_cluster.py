"""A third cluster, as small as one can be: ranks are processes of this machine that a variable numbers.

Run as a program it is the command of a rank, as `launchers.job` is for the clusters of the registry.
"""

import os
import subprocess
import sys
from dataclasses import replace

from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from launchers import job as rank_program
from launchers.clusters import CLUSTERS
from launchers.clusters.base import Cluster, rank_command
from launchers.clusters.local import LocalMachine
from launchers.jobs import JobSpec
from launchers.judge import judge
from launchers.placement import Placement, PlacementRequest, RankPlace
from launchers.submission import Submission, newest_step, submissions_of


class ToyCluster:
    name = "toy"

    def suits(self, request: PlacementRequest) -> bool:
        return request.partition == "toys"

    def place(self, request: PlacementRequest) -> Placement:
        if request.nodes > 2:
            raise UserError(f"--nodes {request.nodes}: there are two toys")
        local = LocalMachine().place(replace(request, nodes=1))
        return replace(local, cluster=self.name, nodes=request.nodes, partition=request.partition)

    def describe(self, placement: Placement) -> str:
        return f"{placement.nodes} toys"

    def preview(self, job: JobSpec) -> str:
        return f"toys would run {job.worker}"

    def refuse_if_running(self, run: RunDir, worker: str) -> None:
        if any(not each.ending_file.exists() and each.read_job().worker == worker for each in submissions_of(run)):
            raise UserError(f"{run.root}: toys are running this run")

    def run(self, job: JobSpec, *, wait: bool) -> int:
        submission = Submission(job.run, job.submission)
        submission.write_job(job.worker, job.arguments)
        job.taken()
        command = [part.replace("launchers.job", "toy_cluster") for part in rank_command(self.name, submission, "1st")]
        ranks = [
            subprocess.Popen(command, env={**os.environ, "TOY_RANK": f"{rank}/{job.placement.num_ranks}"})
            for rank in range(job.placement.num_ranks)
        ]
        status = max(rank.wait() for rank in ranks)
        ends = submission.rank_ends("1st")
        attempt = judge(ends, status=status, first_failure=None, step=newest_step(job.run), leaving=None)
        submission.end(submission.record(attempt)[-1], why=attempt.message)
        return status

    def enter_rank(self) -> RankPlace:
        rank, num_ranks = map(int, os.environ["TOY_RANK"].split("/"))
        return RankPlace(rank, num_ranks, 0, 1, "toys.example", 4242)


def register() -> None:
    toy: Cluster = ToyCluster()
    CLUSTERS[toy.name] = toy


if __name__ == "__main__":
    register()
    rank_program.main(sys.argv[1:])
