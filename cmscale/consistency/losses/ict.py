"""The loss of iCT: weighted, with lognormal indices and no target network (arXiv 2310.14189)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import ICT
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import evaluate, expand_as
from cmscale.rng import SampleRandomness


@dataclass(frozen=True)
class ICTLoss:
    """d(f(x + t_{n+1} z, t_{n+1}), sg f(x + t_n z, t_n)) / (t_{n+1} - t_n), n lognormal; iCT, table 1."""

    method: ICT
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        assert values.num_scales is not None
        times = grid.karras_grid(self.method, values.num_scales)
        p_mean, p_std = self.method.p_mean, self.method.p_std
        index = grid.lognormal_index(random.uniform(), times, p_mean=p_mean, p_std=p_std)
        lower, upper = grid.neighbours(self.method, index, values.num_scales)
        noise = random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        with torch.no_grad():
            less_noisy = clean + expand_as(lower, clean) * noise
            target = evaluate(networks.target_or_student, less_noisy, lower, dropout_keys=keys)
        estimate = evaluate(networks.student, clean + expand_as(upper, clean) * noise, upper, dropout_keys=keys)
        return self.distance(estimate, target) / (upper - lower).to(clean)
