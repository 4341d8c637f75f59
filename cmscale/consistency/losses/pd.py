"""The loss of progressive distillation: one step of the student replaces two of the teacher (arXiv 2202.00512).

The stage's teacher is the `target` network: constant within a stage, replaced by the student at its end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import PD
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import euler_step, evaluate, expand_as
from cmscale.rng import SampleRandomness


@dataclass(frozen=True)
class PDLoss:
    """lambda d(D(x_t, t), x~), where x~ makes one Euler step t -> u end where two Euler steps of the teacher end.

    t and u are neighbours on the Karras grid of N intervals; the teacher's first step ends halfway between them on the
    Karras curve, as in the released consistency code. lambda = max(1 / t^2, 1), the truncated signal-to-noise ratio
    (Salimans and Ho 2022, equation 9), or 1.
    """

    method: PD
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        assert values.num_scales is not None
        assert networks.target is not None
        index = grid.uniform_index(random.uniform(), values.num_scales + 1)
        times = grid.karras_grid(self.method, 2 * values.num_scales + 1).to(index.device, non_blocking=True)
        upper, middle, lower = times[2 * index], times[2 * index - 1], times[2 * index - 2]
        noisy = clean + expand_as(upper, clean) * random.noise(clean.shape[1:]).to(clean)
        with torch.no_grad():
            halfway = euler_step(networks.target, noisy, upper, middle)
            end = euler_step(networks.target, halfway, middle, lower)
            target = noisy - expand_as(upper / (lower - upper), clean) * (end - noisy)
        estimate = evaluate(networks.student, noisy, upper, dropout_keys=random.dropout_keys())
        distance = self.distance(estimate, target)
        if self.method.weighting == "uniform":
            return distance
        return (1 / upper**2).clamp(min=1).to(distance) * distance
