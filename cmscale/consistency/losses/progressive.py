"""Owns the loss of progressive distillation (arXiv 2202.00512): two of the teacher's steps become one.

The teacher of a stage is the `target` network: it stands still within a stage and becomes the student at its end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import PD, Method
from cmscale.config.schedules import Point
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import euler_step, evaluate, like
from cmscale.rng import SampleRandomness


def ends_stage(method: Method, point: Point) -> bool:
    """Whether a stage ends with this step: then optimizer and EMAs begin anew, as the released code's do."""
    return isinstance(method, PD) and point.target_ema == 0.0


@dataclass(frozen=True)
class ProgressiveLoss:
    """lambda d(D(x_t, t), x~), x~ what D must be for one Euler step t -> u to land where two of the teacher's do.

    t and u are neighbours on the Karras grid of N intervals, the teacher stops halfway between them on the curve, as
    the released consistency code has it. lambda = max(1 / t^2, 1), the truncated signal-to-noise ratio (Salimans and
    Ho 2022, equation 9), or 1.
    """

    method: PD
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, point: Point, random: SampleRandomness) -> Tensor:
        assert point.num_scales is not None
        assert networks.target is not None
        index = grid.uniform_index(random.uniform("time"), point.num_scales + 1)
        times = grid.karras_grid(self.method, 2 * point.num_scales + 1).to(index.device)
        upper, middle, lower = times[2 * index], times[2 * index - 1], times[2 * index - 2]
        noisy = clean + like(upper, clean) * random.noise(clean.shape[1:]).to(clean)
        with torch.no_grad():
            halfway = euler_step(networks.target, noisy, upper, middle)
            landed = euler_step(networks.target, halfway, middle, lower)
            aim = noisy - like(upper / (lower - upper), clean) * (landed - noisy)
        estimate = evaluate(networks.student, noisy, upper, dropout_keys=random.dropout_keys())
        found = self.distance(estimate, aim)
        if self.method.weighting == "uniform":
            return found
        return (1 / upper**2).clamp(min=1).to(found) * found
