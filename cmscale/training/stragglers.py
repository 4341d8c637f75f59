"""Owns the look for a slow rank: in lockstep all wait for it, so that only what each does before it waits tells."""

import statistics
import time

from cmscale.distributed.collectives import gather
from cmscale.distributed.world import World
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event

FACTOR = 2.0  # times the median of the ranks
MARGIN = 0.05  # seconds above it: less is the noise of small runs


class Stragglers:
    """Compares the ranks' own seconds of a step: getting the data, and the first forward pass."""

    def __init__(self, run: RunDir, world: World, *, every: int) -> None:
        self._run = run
        self._world = world
        self._every = every
        self._began = 0.0
        self._seconds: list[float] = []

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def stepped(self, step: int, *, ready: float, forward: float) -> None:
        """A step was applied. Collective every so often.

        Args:
            ready: when, by `time.perf_counter`, its data was there.
            forward: seconds of its first forward pass.
        """
        self._seconds.append(ready - self._began + forward)
        if step % self._every:
            return
        means = gather(statistics.fmean(self._seconds))
        self._seconds.clear()
        rank = slowest(means)
        if rank is not None and self._world.is_main:
            why = f"rank {rank} takes {means[rank]:.3f} s a step before it meets the others, the median is "
            write_event(self._run, "straggler", step=step, rank=rank, why=f"{why}{statistics.median_low(means):.3f} s")


def slowest(means: list[float]) -> int | None:
    """The rank far above the median, None where there is none."""
    median = statistics.median_low(means)
    rank = max(range(len(means)), key=means.__getitem__)
    return rank if means[rank] > max(FACTOR * median, median + MARGIN) else None
