"""The loss of CD: neighbouring times on the teacher's trajectory (Song et al. 2023, algorithm 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import CD
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency.distance import Distance
from cmscale.consistency.losses.base import uniform_neighbours
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import STEPS, evaluate, expand_as
from cmscale.rng import SampleRandomness


@dataclass(frozen=True)
class CDLoss:
    """d(f(x_{n+1}, t_{n+1}), f-(x_n, t_n)), x_{n+1} = x + t_{n+1} z; Consistency Models, equation 7.

    x_n is one step of the ODE solver with the teacher from x_{n+1}. Student and target get the same dropout keys; the
    teacher has no dropout. The weight lambda is 1, as in the paper.
    """

    method: CD
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        assert networks.teacher is not None, "CD needs a teacher"
        lower, upper = uniform_neighbours(self.method, values, random)
        noise = random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        noisy = clean + expand_as(upper, clean) * noise
        with torch.no_grad():
            less_noisy = STEPS[self.method.solver](networks.teacher, noisy, upper, lower)
            target = evaluate(networks.target_or_student, less_noisy, lower, dropout_keys=keys)
        return self.distance(evaluate(networks.student, noisy, upper, dropout_keys=keys), target)
