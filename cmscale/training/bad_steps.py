"""Handles steps that were not finite: keeps their batches, and decides when training must roll back."""

import math

from safetensors.torch import save_file

from cmscale.config import Config
from cmscale.data import Batch
from cmscale.distributed.world import World
from cmscale.engine.engine import StepResult
from cmscale.runs.folder import RunDir, step_name
from cmscale.runs.log import write_event
from cmscale.runs.manifests import TrainState


class BadSteps:
    """Counts steps that were not applied. All ranks see the same results, so all decide the same.

    An fp16 overflow above the smallest loss scale is not counted: it is how the scale is found.
    """

    def __init__(self, config: Config, run: RunDir, world: World) -> None:
        self._config = config
        self._run = run
        self._world = world
        self._in_a_row = 0
        self._rollbacks = 0

    def is_lost(self, result: StepResult, batch: Batch, state: TrainState) -> bool:
        """Counts a step. Returns whether training must roll back (`train.max_nonfinite_steps` of them in a row).

        Raises:
            RuntimeError: it rolled back `train.max_rollbacks` times already.
        """
        scaling = math.isfinite(result.loss) and result.loss_scale > 1
        if result.applied or scaling:
            self._in_a_row = 0 if result.applied else self._in_a_row
            return False
        self._in_a_row += 1
        self._keep(batch, state)
        train = self._config.train
        if self._in_a_row < train.max_nonfinite_steps:
            return False
        where = f"after step {state.step}: {self._in_a_row} batches in a row gave no finite loss or gradient"
        if self._rollbacks == train.max_rollbacks:
            raise RuntimeError(f"{where}, after {self._rollbacks} rollbacks; see logs/nonfinite-*.safetensors")
        self._rollbacks += 1
        self._in_a_row = 0
        if self._world.is_main:
            write_event(self._run, "rolled_back", step=state.step, rank=0, why=where)
        return True

    def _keep(self, batch: Batch, state: TrainState) -> None:
        """Saves this rank's share of the batch in logs/, with the positions that its noise is drawn from."""
        name = f"nonfinite-{step_name(state.step)}-cursor-{state.cursor}-rank-{self._world.rank:04d}.safetensors"
        self._run.logs.mkdir(exist_ok=True)
        save_file(
            {"images": batch.images.contiguous(), "flips": batch.flips},
            self._run.logs / name,
            metadata={"positions": ",".join(map(str, batch.positions)), "keys": ",".join(batch.keys)},
        )
        write_event(
            self._run, "nonfinite_step", step=state.step, rank=self._world.rank, why=f"batch kept in logs/{name}"
        )
