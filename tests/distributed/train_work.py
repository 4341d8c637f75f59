"""Rank functions of the tests of whole runs: they train a run folder, optionally until a signal."""

import json
import os
import signal
import threading
import time
from pathlib import Path

from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from cmscale.training import loop


def to_the_end(run_dir: str) -> None:
    """Trains, and prints how it ended."""
    print(json.dumps(loop.main(run_dir)))


def until_signalled(run_dir: str, step: int, number: int) -> None:
    """Trains, and on rank 0 sends itself signal `number` once `step` is logged."""
    if os.environ["RANK"] == "0":
        threading.Thread(target=_signal_at, args=(RunDir(Path(run_dir)), step, number), daemon=True).start()
    to_the_end(run_dir)


class BreakingWandb:
    """A wandb run that fails in `log` from a step on, and blocks in `finish`."""

    def __init__(self, *, breaks_at: int) -> None:
        self.breaks_at = breaks_at

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, record: dict[str, float], *, step: int, commit: bool) -> None:
        assert step >= record["step"]
        assert commit
        if record["step"] >= self.breaks_at:
            raise ConnectionError("wandb went away")

    def finish(self) -> None:
        threading.Event().wait()


def while_wandb_breaks(run_dir: str, breaks_at: int, until: int | None) -> None:
    """Trains to the end or until a SIGTERM with such a wandb, and records the wandb ids."""
    import wandb  # imported here, as it is slow and the other runs do not need it

    def init(**asked: str) -> BreakingWandb:
        with (Path(run_dir) / "wandb-ids").open("a") as file:
            file.write(f"{asked['id']} {asked['resume']}\n")
        return BreakingWandb(breaks_at=breaks_at)

    wandb.init = init  # pyright: ignore[reportAttributeAccessIssue]
    if until is None:
        to_the_end(run_dir)
    else:
        until_signalled(run_dir, until, signal.SIGTERM)


def _signal_at(run: RunDir, step: int, number: int) -> None:
    while not any(record["step"] >= step for record in read_lines(run.metrics)):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.Signals(number))
