"""Describes jobs: a worker's name, plain JSON arguments, the run that it works in, and where it runs."""

import importlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmscale.io.process import CHECKOUT
from cmscale.runs.folder import RunDir
from launchers.placement import Placement

TRAIN = "train"
EVALUATE = "evaluate"
SAMPLE = "sample"
WORKERS = {
    TRAIN: "cmscale.training.loop:main",
    EVALUATE: "cmscale.evaluation.evaluate:main",
    SAMPLE: "cmscale.generation.draw_job:main",
}
"""Worker's name -> `module:function`. Named by string: the launchers themselves import no torch."""

MEET = "cmscale.distributed.world:meet"
"""Has the ranks of a foreign launcher meet, before any of them has a run."""

_FORMER_NAMES = {
    "cmscale.train:main": TRAIN,
    "cmscale.evaluate:main": EVALUATE,
    **{function: name for name, function in WORKERS.items()},
}


@dataclass(frozen=True)
class JobSpec:
    """A job that a command hands to a cluster.

    Attributes:
        worker: A name in WORKERS, or `module:function`. The function returns `finished`, `preempted` or `superseded`;
            a UserError ends its rank with status 2 and one line, any other exception with status 1 and a traceback.
        arguments: Positional arguments of the worker: JSON values.
        run: The run in whose folder the job works.
        evaluations: Arguments of `launchers.evaluate_checkpoints`, which runs while the job does; empty for none.
        submission: Names all starts of this job.
        code: The folder that holds the packages which all starts import; made by `take_snapshot`.
        taken: Called once the job can't be refused any more: the command prints its plan then.
    """

    worker: str
    arguments: tuple[Any, ...]
    run: RunDir
    placement: Placement
    evaluations: tuple[str, ...] = ()
    submission: str = field(default_factory=lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")
    code: Path = CHECKOUT
    taken: Callable[[], None] = lambda: None

    @property
    def python_path(self) -> str:
        """PYTHONPATH of the job's processes on this machine."""
        return os.pathsep.join(filter(None, [str(self.code), os.environ.get("PYTHONPATH")]))


def current_name(worker: str) -> str:
    """A worker's name, also for the names that older versions wrote to disk."""
    return _FORMER_NAMES.get(worker, worker)


def load_worker(worker: str) -> Callable[..., str]:
    """Imports the function of a worker."""
    module, _, function = WORKERS.get(worker, worker).partition(":")
    return getattr(importlib.import_module(module), function)
