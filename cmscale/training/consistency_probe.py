"""Owns the consistency error of whole networks: mean curves over images, and the probe that training takes.

Held out are the trajectories: noise under a purpose of its own and 100 times off every training grid. So are the
images, where a data set of its own is named (LSUN has `val`); else they are the first ones of the training data.
"""

import numpy as np

from cmscale.config import CD, SCD, Config, Diffusion, schedules
from cmscale.consistency.consistency_curve import error_curve
from cmscale.consistency.solver import Denoise
from cmscale.data.held_out import held_out_images
from cmscale.distributed import collectives
from cmscale.distributed.world import World
from cmscale.engine.engine import Engine
from cmscale.model.precondition import denoiser_for

PROBE_IMAGES = 16


def follows_teacher(method: Diffusion) -> bool:
    """Whether a method's trajectories are its teacher's ODE (distillation), not straight lines x + t z."""
    return isinstance(method, CD | SCD)


class Probe:
    """Measures the first EMA's consistency error on a fixed batch while training, drawing no number that training does.

    Every `train.consistency_error_every` steps and at the last; 0 is never.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        if not config.train.consistency_error_every:
            return
        share = -(-PROBE_IMAGES // world.num_ranks)
        indices = range(world.rank * share, (world.rank + 1) * share)
        url = config.train.consistency_error_data or config.data.path
        images = held_out_images(url, count=PROBE_IMAGES, size=config.model.image_size)
        # All ranks evaluate as often, as ZeRO-3 needs it: with many ranks or few images, images come again.
        self._indices = [index % len(images) for index in indices]
        self._clean = images[self._indices]

    def after(self, step: int, engine: Engine, teacher: Denoise | None) -> float | None:
        """The mean error over neighbouring times and images; None where none is due after this step. Collective."""
        method, train = self._config.method, self._config.train
        if not schedules.is_due(step, train.consistency_error_every, train.total_steps):
            return None
        with engine.showing(self._config.ema.names[0]) as network:
            curve = error_curve(
                method,
                denoiser_for(method, network),
                self._clean,
                indices=self._indices,
                teacher=teacher if follows_teacher(method) else None,
                device=self._world.device,
            )
        return float(np.mean(collectives.gather(curve.mean)))
