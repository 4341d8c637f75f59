"""Measures the consistency error of the network during training, on a fixed batch."""

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
    """Measures the first EMA's consistency error every `train.consistency_error_every` steps and after the last one.

    The images are the first ones of `train.consistency_error_data`, or of the training data if it is not set. Noise
    and times are never those of training: the noise has a separate key, and the times lie on no training grid.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        if not config.train.consistency_error_every:
            return
        share = -(-PROBE_IMAGES // world.num_ranks)
        indices = range(world.rank * share, (world.rank + 1) * share)
        url = config.train.consistency_error_data or config.data.path
        images = collectives.together(lambda: first_images(url, count=PROBE_IMAGES, size=config.model.image_size))
        # ZeRO-3 needs the same number of evaluations on all ranks: with many ranks or few images, images repeat
        self._indices = [index % len(images) for index in indices]
        self._clean = images[self._indices]

    def after(self, step: int, engine: Engine, teacher: Denoise | None) -> float | None:
        """The mean error over neighbouring times and images; None if it is not due after this step. Collective."""
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
