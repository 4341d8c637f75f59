"""Runs the ranks of one start on this machine, and ends all of them when one fails: submitit's controller, extended."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from submitit.local.local import Controller

from cmscale.errors import UserError
from cmscale.io.process import die_with_parent
from cmscale.runs.folder import RunDir
from launchers.clusters.base import rank_command
from launchers.submission import Submission

PEERS_SECONDS = 2.0
"""Time for the other ranks to report their own errors (all may refuse the same config) before they are ended."""


class RankController(Controller):
    """submitit's controller waits for every rank; those that lost a peer would hang in a collective.

    Args:
        grace_seconds: From SIGTERM to SIGKILL.
        time_limit_seconds: After this the ranks are killed.
        signal_seconds: This long before the time limit ranks get SIGUSR2.
    """

    def __init__(
        self,
        submission: Submission,
        start: str,
        *,
        num_ranks: int,
        grace_seconds: float,
        time_limit_seconds: int,
        signal_seconds: int,
    ) -> None:
        # submitit's controller and JobEnvironment take their arguments from these variables and have no other way.
        os.environ.update(
            SUBMITIT_EXECUTOR="local",
            SUBMITIT_LOCAL_NTASKS=str(num_ranks),
            SUBMITIT_LOCAL_COMMAND=shlex.join(rank_command("local", submission, start)),
            SUBMITIT_LOCAL_TIMEOUT_S=str(time_limit_seconds),
            SUBMITIT_LOCAL_SIGNAL_DELAY_S=str(signal_seconds),
            SUBMITIT_LOCAL_WITH_SHELL="",
            SUBMITIT_STDERR_TO_STDOUT="1",
        )
        super().__init__(submission.run.logs)
        self._submission, self._start = submission, start
        self.grace_seconds = grace_seconds
        self.kill_at = float("inf")
        signal.signal(signal.SIGTERM, self._stop)
        die_with_parent(signal.SIGTERM)  # if the launcher is killed, ranks still save and end

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._send(signal.Signals(number))
        self.kill_at = min(self.kill_at, time.monotonic() + self.grace_seconds)

    def _send(self, number: signal.Signals) -> None:
        for task in self.tasks:
            if task.poll() is None:
                task.send_signal(number)

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Waits until all ranks have ended; kills those that outlive a failed rank, the grace or the time limit."""
        began = time.monotonic()
        self.kill_at = min(self.kill_at, began + self.timeout_s)
        signal_at = began + self.timeout_s - self.signal_delay_s
        first: dict[str, int] | None = None
        while None in (codes := [task.poll() for task in self.tasks]):
            now = time.monotonic()
            if first is None and (first := first_failure(codes)):
                self.kill_at = min(self.kill_at, now + PEERS_SECONDS)
            if now >= signal_at:
                signal_at = float("inf")
                self._send(signal.SIGUSR2)
            if now >= self.kill_at:
                self._send(signal.SIGKILL)
            time.sleep(1 / freq)
        worst = max(code if code >= 0 else 128 - code for code in codes if code is not None)
        exits = {"status": worst, "first": first or first_failure(codes), "codes": list(codes)}
        with contextlib.suppress(UserError):  # the launcher can't write either, and says so
            self._submission.write_exits(self._start, exits)
        return codes

    def run(self, max_retry: int = 1) -> None:  # noqa: ARG002
        """Starts the ranks once: the launcher decides whether they start again."""
        try:
            self.start_tasks()
            self.wait()
        finally:
            self._send(signal.SIGKILL)


def first_failure(codes: Sequence[int | None]) -> dict[str, int] | None:
    """The rank that failed; of several one that was killed by a signal, because its peers fail as a consequence."""
    bad = sorted((code, rank) for rank, code in enumerate(codes) if code)
    return {"rank": bad[0][1], "code": bad[0][0]} if bad else None


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="launchers.clusters.local_controller", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("submission")
    parser.add_argument("start")
    parser.add_argument("--num-ranks", type=int, required=True)
    parser.add_argument("--grace-seconds", type=float, required=True)
    parser.add_argument("--time-limit-seconds", type=int, required=True)
    parser.add_argument("--signal-seconds", type=int, required=True)
    flags = vars(parser.parse_args(arguments))
    submission = Submission(RunDir(flags.pop("run")), flags.pop("submission"))
    RankController(submission, flags.pop("start"), **flags).run()


if __name__ == "__main__":
    main(sys.argv[1:])
