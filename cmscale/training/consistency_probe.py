"""Measures the consistency error of the network in training, on a fixed batch that training does not draw from."""

import numpy as np

from cmscale.config import Config, schedules
from cmscale.consistency.consistency_curve import error_curve
from cmscale.consistency.solver import Denoise
from cmscale.data.first_images import first_images
from cmscale.distributed import collectives
from cmscale.distributed.world import World
from cmscale.engine.engine import Engine
from cmscale.model.precondition import denoiser_for

PROBE_IMAGES = 16


class Probe:
    """Measures the first EMA's consistency error every `train.consistency_error_every` steps and at the last one.

    The noise has a purpose of its own and the times lie off every training grid, so that no number is shared with
    training. The images are those of `train.consistency_error_data`, else the first ones of the training data.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        if not config.train.consistency_error_every:
            return
        share = -(-PROBE_IMAGES // world.num_ranks)
        indices = range(world.rank * share, (world.rank + 1) * share)
        url = config.train.consistency_error_data or config.data.path
        images = first_images(url, count=PROBE_IMAGES, size=config.model.image_size)
        # ZeRO-3 needs equally many evaluations on all ranks: with many ranks or few images, images repeat.
        self._indices = [index % len(images) for index in indices]
        self._clean = images[self._indices]

    def after(self, step: int, engine: Engine, teacher: Denoise | None) -> float | None:
        """The mean error over neighbouring times and images; None if none is due after this step. Collective."""
        method, train = self._config.method, self._config.train
        if not schedules.is_due(step, train.consistency_error_every, train.total_steps):
            return None
        with engine.showing(self._config.ema.names[0]) as network:
            curve = error_curve(
                method,
                denoiser_for(method, network),
                self._clean,
                indices=self._indices,
                teacher=teacher if method.facts.follows_teacher else None,
                device=self._world.device,
            )
        return float(np.mean(collectives.gather(curve.mean)))
