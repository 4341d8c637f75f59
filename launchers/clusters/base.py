"""Defines what a cluster is to the launchers: places jobs, starts them, and says where each rank is.

A cluster is one module of this package, and a line in `launchers.clusters.CLUSTERS`. In each rank it runs the command
`python -P -u -m launchers.job CLUSTER RUN SUBMISSION START` (`rank_command`), which calls the cluster's `enter_rank`,
with the job's `code` first on PYTHONPATH: -P keeps Python from importing the packages of the folder it starts in.
"""

import sys
from collections.abc import Sequence
from typing import Protocol

from cmscale.runs.folder import RunDir
from launchers.jobs import JobSpec
from launchers.placement import Placement, PlacementRequest, RankPlace
from launchers.submission import Submission


class Cluster(Protocol):
    """A place where jobs run."""

    name: str
    """The value of `--cluster`."""

    def suits(self, request: PlacementRequest) -> bool:
        """Whether `--cluster auto` takes this cluster; the first in the order of CLUSTERS that suits is taken."""
        ...

    def place(self, request: PlacementRequest) -> Placement:
        """The placement of a job. Raises UserError if the request cannot be met here."""
        ...

    def describe(self, placement: Placement) -> str:
        """The cluster in a few words, for the plan that commands print."""
        ...

    def preview(self, job: JobSpec) -> str:
        """What `run` would submit, for `--dry-run`; empty if there is nothing to show."""
        ...

    def refuse_if_running(self, run: RunDir, worker: str) -> None:
        """Raises UserError if a job of this worker that was started earlier may still be working in the run."""
        ...

    def run(self, job: JobSpec, *, wait: bool) -> int:
        """Starts a job, calls `job.taken` as soon as it is not refused, and starts it again as `launchers.decide` says.

        Args:
            wait: Whether to return only when the job has ended for good; some clusters always wait.

        Returns:
            The exit status: 0 if the job finished, or was submitted and is not waited for; 2 after a user's mistake,
            1 or a higher value otherwise.
        """
        ...

    def enter_rank(self) -> RankPlace:
        """Called first in the process of every rank. Returns the rank's place."""
        ...


def rank_command(
    cluster: str, submission: Submission, start: str, interpreter: Sequence[str] = (sys.executable,)
) -> list[str]:
    """The command of every rank. `start` names the start of the job among those of its submission."""
    python = [*interpreter, "-P", "-u", "-m", "launchers.job"]
    return [*python, cluster, str(submission.run.root), submission.name, start]
