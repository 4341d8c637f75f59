"""Owns the wish to stop: signals set a flag, and all ranks agree on it at a step's boundary."""

import os
import signal
from types import FrameType

from cmscale.distributed.collectives import any_rank
from cmscale.io.process import EARLY_SIGNAL

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Preemption:
    """Whether this run was asked to save and leave.

    SIGTERM (Slurm's GraceTime, `scancel`) and SIGUSR2 (submitit's and `--signal`) count, once, however often
    they come;
    outside Slurm also the first Ctrl-C, the second interrupts. A handler only sets a flag: no collective
    runs in it.
    """

    def __init__(self) -> None:
        self._received: str | None = None

    @classmethod
    def install(cls) -> "Preemption":
        """Takes over the signals of this process. Call from the main thread, after others who do."""
        watched = cls()
        signals = SIGNALS if "SLURM_JOB_ID" in os.environ else (*SIGNALS, signal.SIGINT)
        for number in signals:
            signal.signal(number, watched._receive)
        watched._received = watched._received or os.environ.get(EARLY_SIGNAL)  # after: none falls in between
        return watched

    @property
    def why(self) -> str:
        """The name of the signal that this rank got first; `another rank` where only others did."""
        return self._received or "another rank"

    @property
    def flagged(self) -> bool:
        """Whether this rank was asked to leave; others may not have been."""
        return self._received is not None

    def requested(self) -> bool:
        """Whether any rank was asked to leave. Collective: call on all ranks, at the step's boundary."""
        return any_rank(self._received is not None)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number).name
