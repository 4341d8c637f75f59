"""Handles steps with a non-finite loss or gradient: saves their batches, and decides when to roll back."""

import math

from safetensors.torch import save

from cmscale.config import Config
from cmscale.data import Batch
from cmscale.distributed.world import World
from cmscale.engine.engine import StepResult
from cmscale.io.durable import replace_durably
from cmscale.io.remarks import dispensable
from cmscale.runs.folder import RunDir, step_name
from cmscale.runs.log import write_event
from cmscale.runs.manifests import TrainState


class BadSteps:
    """Counts non-finite steps. All ranks get the same results and therefore decide alike.

    An fp16 overflow with a loss scale above 1 is not counted, as the loss scale is found by overflows.
    """

    def __init__(self, config: Config, run: RunDir, world: World) -> None:
        self._config = config
        self._run = run
        self._world = world
        self._consecutive = 0
        self._rollbacks = 0

    def must_roll_back(self, result: StepResult, batch: Batch, state: TrainState) -> bool:
        """Counts a step. Returns whether it is the last of `train.max_nonfinite_steps` consecutive non-finite ones.

        Raises:
            RuntimeError: training has already rolled back `train.max_rollbacks` times.
        """
        scaling = math.isfinite(result.loss) and result.loss_scale > 1
        if result.applied or scaling:
            self._consecutive = 0 if result.applied else self._consecutive
            return False
        self._consecutive += 1
        self._save(batch, state)
        train = self._config.train
        if self._consecutive < train.max_nonfinite_steps:
            return False
        problem = f"after step {state.step}: {self._consecutive} consecutive batches without finite loss and gradient"
        if self._rollbacks == train.max_rollbacks:
            raise RuntimeError(f"{problem}, after {self._rollbacks} rollbacks; see logs/nonfinite-*.safetensors")
        self._rollbacks += 1
        self._consecutive = 0
        if self._world.is_main:
            with dispensable("rolled_back"):
                write_event(self._run, "rolled_back", step=state.step, rank=0, why=problem)
        return True

    def _save(self, batch: Batch, state: TrainState) -> None:
        """Saves this rank's part of the batch in logs/, with the positions that key its noise."""
        name = f"nonfinite-{step_name(state.step)}-cursor-{state.cursor}-rank-{self._world.rank:04d}.safetensors"
        tensors = {"images": batch.images.contiguous(), "flips": batch.flips}
        metadata = {"positions": ",".join(map(str, batch.positions)), "keys": ",".join(batch.keys)}
        with dispensable(f"logs/{name}"):
            if not self._run.logs.is_dir():  # the run was moved or removed: its old folder is not made anew for this
                raise FileNotFoundError(f"there is no folder {self._run.logs}")
            replace_durably(self._run.logs / name, save(tensors, metadata))
            why = f"batch saved in logs/{name}"
            write_event(self._run, "nonfinite_step", step=state.step, rank=self._world.rank, why=why)
