"""The loss of CT: neighbouring times on the line x + t z (Song et al. 2023, algorithm 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import CT
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency.distance import Distance
from cmscale.consistency.losses.base import uniform_neighbours
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import evaluate, expand_as
from cmscale.rng import SampleRandomness


@dataclass(frozen=True)
class CTLoss:
    """lambda d(f(x + t_{n+1} z, t_{n+1}), f-(x + t_n z, t_n)) with one z; Consistency Models, equation 10.

    Student and target get the same dropout keys. lambda is 1, as in the paper; with `weighting: inverse_gap` it is
    iCT's 1 / (t_{n+1} - t_n).
    """

    method: CT
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        lower, upper = uniform_neighbours(self.method, values, random)
        noise = random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        noisy = clean + expand_as(upper, clean) * noise
        with torch.no_grad():
            less_noisy = clean + expand_as(lower, clean) * noise
            target = evaluate(networks.target_or_student, less_noisy, lower, dropout_keys=keys)
        distance = self.distance(evaluate(networks.student, noisy, upper, dropout_keys=keys), target)
        if self.method.weighting == "inverse_gap":
            return distance / (upper - lower).to(distance)
        return distance
