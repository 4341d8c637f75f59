"""Finds a slow rank by the time that each rank takes before it first waits for the others in a step."""

import statistics
import time

from cmscale.distributed.collectives import gather
from cmscale.distributed.world import World
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event

FACTOR = 2.0  # of the ranks' median
MARGIN = 0.05  # seconds above the median; smaller differences are noise


class Stragglers:
    """Compares the ranks' own seconds of a step: getting the data, and the first forward pass."""

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
            ready: `time.perf_counter()` when the step's data was there.
            forward: seconds of its first forward pass.
        """
        self._seconds.append(ready - self._began + forward)
        if step % self._every:
            return
        means = gather(statistics.fmean(self._seconds))
        self._seconds.clear()
        rank = slowest(means)
        if rank is not None and self._world.is_main:
            why = f"rank {rank} takes {means[rank]:.3f} s per step before it first waits for the others, the median is "
            write_event(self._run, "straggler", step=step, rank=rank, why=f"{why}{statistics.median_low(means):.3f} s")


def slowest(means: list[float]) -> int | None:
    """The rank that is far above the median; None if there is none."""
    median = statistics.median_low(means)
    rank = max(range(len(means)), key=means.__getitem__)
    return rank if means[rank] > max(FACTOR * median, median + MARGIN) else None
