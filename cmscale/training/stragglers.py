"""Finds a slow rank by the time that each rank needs before the first collective of a step."""

import statistics
import time

from cmscale.distributed.collectives import gather
from cmscale.distributed.world import World
from cmscale.io.remarks import dispensable
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event

FACTOR = 2.0  # times the median of the ranks
MARGIN = 0.05  # seconds above the median; smaller differences are noise


class Stragglers:
    """Compares the time per step that each rank needs to get its data and for the first forward pass."""

    def __init__(self, run: RunDir, world: World, *, every: int) -> None:
        self._run = run
        self._world = world
        self._every = every
        self._began = 0.0
        self._seconds: list[float] = []

    def begin(self) -> None:
        """Call at the start of a step."""
        self._began = time.perf_counter()

    def stepped(self, step: int, *, ready: float, forward: float) -> None:
        """Call after an applied step. Collective every `every` steps.

        Args:
            ready: `time.perf_counter()` when the first forward pass began, less the time that all ranks spent together.
            forward: Seconds of its first forward pass.
        """
        self._seconds.append(ready - self._began + forward)
        if step % self._every:
            return
        means = gather(statistics.fmean(self._seconds))
        self._seconds.clear()
        rank = slowest(means)
        if rank is not None and self._world.is_main:
            why = (
                f"rank {rank} needs {means[rank]:.3f} s per step before the first collective, "
                f"the median rank {statistics.median_low(means):.3f} s"
            )
            with dispensable(f"straggler at step {step}"):
                write_event(self._run, "straggler", step=step, rank=rank, why=why)


def slowest(means: list[float]) -> int | None:
    """The slowest rank if it is far above the median, else None."""
    median = statistics.median_low(means)
    rank = max(range(len(means)), key=means.__getitem__)
    return rank if means[rank] > max(FACTOR * median, median + MARGIN) else None
