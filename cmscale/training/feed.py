"""Gives the ranks their batches together, and lets them wait together while storage does not answer one of them."""

import contextlib
import time

from cmscale.data import Batch, Batches
from cmscale.distributed.collectives import LOOK_SECONDS, any_ranks
from cmscale.distributed.world import World
from cmscale.engine.preemption import Preemption
from cmscale.engine.watchdog import Watchdog
from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event


class Feed:
    """The batches of a rank, each handed out once every rank has its own, unless a rank was asked to stop.

    A rank whose storage does not answer says so to the others at every look instead of leaving them in a collective;
    then no watchdog and no time-out takes any of them for hung, and a request to stop is still followed at once. A rank
    that waits for anything else takes part in no look.

    Attributes:
        shared_seconds: Time of the last `next` that was spent together with the other ranks.
    """

    def __init__(
        self, batches: Batches, run: RunDir, world: World, *, preemption: Preemption, watchdog: Watchdog
    ) -> None:
        self._batches = batches
        self._run = run
        self._world = world
        self._preemption = preemption
        self._watchdog = watchdog
        self._since: float | None = None
        self.shared_seconds = 0.0

    def next(self, step: int) -> tuple[Batch, int] | None:
        """The next batch and the cursor after it; None if any rank was asked to stop. Collective."""
        self.shared_seconds = 0.0
        while True:
            is_ready = self._batches.wait(LOOK_SECONDS, leave=lambda: self._preemption.flagged)
            began = time.perf_counter()
            stop, waits = any_ranks(self._preemption.flagged, not is_ready)
            self.shared_seconds += time.perf_counter() - began
            if stop:
                return None
            if not waits:
                self._report(step, waits=False)
                return next(self._batches)
            self._report(step, waits=True)
            self._watchdog.beat(step)

    def _report(self, step: int, *, waits: bool) -> None:
        """Writes an event when the ranks begin to wait for storage, and when they go on."""
        if waits == (self._since is not None):
            return
        waited = 0.0 if self._since is None else time.monotonic() - self._since
        self._since = time.monotonic() if waits else None
        if self._world.is_main:
            with contextlib.suppress(OSError, UserError):
                if waits:
                    write_event(self._run, "storage_away", step=step, rank=0, why="a rank waits for its data")
                else:
                    write_event(self._run, "storage_back", step=step, rank=0, seconds=round(waited, 1))
