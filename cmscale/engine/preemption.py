"""Turns signals into a request to save and stop, on which all ranks agree at a step's boundary."""

import contextlib
import os
import signal
from types import FrameType

from cmscale.distributed.collectives import any_rank
from cmscale.io.process import EARLY_SIGNAL

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_STOPPING = b"stopping after what is computed now; Ctrl-C again ends it at once\n"


class Preemption:
    """Whether this run was asked to save and stop.

    SIGTERM (Slurm's GraceTime, `scancel`) and SIGUSR2 (Slurm's `--signal`) count, as one request however often they
    come. Outside Slurm the first Ctrl-C counts too, and the second interrupts. The handler only sets a flag, because
    no collective may run in it.
    """

    def __init__(self) -> None:
        self._received: str | None = None

    @classmethod
    def install(cls) -> "Preemption":
        """Installs the handlers. Call it in the main thread, after all others that install handlers."""
        watched = cls()
        signals = SIGNALS if "SLURM_JOB_ID" in os.environ else (*SIGNALS, signal.SIGINT)
        for number in signals:
            signal.signal(number, watched._receive)
        watched._received = watched._received or os.environ.get(EARLY_SIGNAL)  # read last: no signal is lost in between
        return watched

    @property
    def why(self) -> str:
        """The name of the first signal that this rank got; `another rank` if only others got one."""
        return self._received or "another rank"

    @property
    def flagged(self) -> bool:
        """Whether this rank was asked to stop; others may not have been."""
        return self._received is not None

    def ask(self, why: str) -> None:
        """Asks this rank to stop, as a signal does."""
        self._received = self._received or why

    def requested(self) -> bool:
        """Whether any rank was asked to stop. Collective: call it on all ranks, at the step's boundary."""
        return any_rank(self._received is not None)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, _STOPPING)
        self._received = self._received or signal.Signals(number).name
