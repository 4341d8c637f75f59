"""Owns the ranks of a job on this machine: starts them, and ends all of them when one ends badly."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from submitit.local.local import Controller, LocalJobEnvironment

from cmscale.runs.folder import RunDir
from launchers.outcome import attempt_folder, write_json

PEERS_SECONDS = 2.0  # what peers get to say the same (a config that every rank refuses) before they are ended
_PR_SET_PDEATHSIG = 1


class EndingController(Controller):
    """submitit's controller waits for every rank; peers of a dead one would hang in a collective for ever."""

    def __init__(self, folder: Path) -> None:
        self.stop_at: float | None = None
        super().__init__(folder)
        # A launcher that was killed takes its ranks along, in good order.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _forward_signal(self, signum: int, *_: FrameType | None) -> None:
        super()._forward_signal(signal.Signals(signum))
        if signum == signal.SIGTERM and self.stop_at is None:
            self.stop_at = time.monotonic() + float(os.environ["CMSCALE_GRACE_SECONDS"])

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Until all ranks ended; those that outlive a failed rank, the grace or the time limit are killed."""
        began = time.monotonic()
        warned = False
        first: dict[str, int] | None = None
        while None in (codes := [task.poll() for task in self.tasks]):
            now = time.monotonic()
            if first is None and (first := _first_bad(codes)):
                self.stop_at = min(self.stop_at or now + PEERS_SECONDS, now + PEERS_SECONDS)
            if not warned and now - began >= self.timeout_s - self.signal_delay_s:
                warned = True
                self._forward_signal(LocalJobEnvironment._usr_sig())
            if now >= min(self.stop_at or float("inf"), began + self.timeout_s):
                self._forward_signal(signal.SIGKILL)
            time.sleep(1 / freq)
        first = first or _first_bad(codes)
        worst = max(code if code >= 0 else 128 - code for code in codes if code is not None)
        folder = attempt_folder(RunDir(Path(os.environ["CMSCALE_RUN_DIR"])))
        write_json(folder / "exits.json", {"status": worst, "first": first, "codes": list(codes)})
        return codes

    def run(self, max_retry: int = 1) -> None:  # noqa: ARG002
        """Starts the ranks once: whether they start again is the launcher's decision."""
        try:
            self.start_tasks()
            self.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._forward_signal(signal.SIGKILL)


def _first_bad(codes: Sequence[int | None]) -> dict[str, int] | None:
    """The rank that ended badly; of several at once one that was killed: its peers fail for want of it."""
    bad = sorted((code, rank) for rank, code in enumerate(codes) if code)
    return {"rank": bad[0][1], "code": bad[0][0]} if bad else None


if __name__ == "__main__":
    EndingController(Path(sys.argv[1])).run()
