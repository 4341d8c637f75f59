"""The loss of multistep consistency distillation: jumps to the start of a segment (arXiv 2403.06807, algorithm 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import MCD
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import ESTIMATES, addim_estimate, evaluate, expand_as, toward
from cmscale.rng import SampleRandomness


@dataclass(frozen=True)
class MCDLoss:
    """lambda d(D(x_t, t), x^), where the line from x_t towards x^ meets the start of the segment where two steps end.

    The first goes with the teacher from t to its neighbour s, the second from there with the student, without gradient,
    to the segment's start u <= s. With the estimates D1 and D2 of the two steps

        x^ = (1 - a) D1 + a D2,  a = t (s - u) / (s (t - u)),

    which is D1 where s is the start. It is the end's inverse DDIM step without that formula's differences of large
    numbers. lambda = 1 / t^2 + 1 / sd^2 or 1.
    """

    method: MCD
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        assert values.num_scales is not None
        assert networks.teacher is not None, "MCD needs a teacher"
        method = self.method
        index = grid.uniform_index(random.uniform(), values.num_scales)
        lower, upper = grid.neighbours(method, index, values.num_scales)
        start = self._start(index, values.num_scales)
        noisy = clean + expand_as(upper, clean) * random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        with torch.no_grad():
            if method.solver == "addim":
                followed = addim_estimate(networks.teacher, noisy, upper, lower, clean=clean)
            else:
                followed = ESTIMATES[method.solver](networks.teacher, noisy, upper, lower)
            less_noisy = toward(followed, noisy, upper, lower)
            own = evaluate(networks.target_or_student, less_noisy, lower, dropout_keys=keys)
            share = expand_as(upper * (lower - start) / (lower * (upper - start)), clean)
            target = followed + share * (own - followed)
        distance = self.distance(evaluate(networks.student, noisy, upper, dropout_keys=keys), target)
        if method.weighting == "uniform":
            return distance
        return (1 / upper**2 + 1 / method.sigma_data**2).to(distance) * distance

    def _start(self, index: Tensor, num_scales: int) -> Tensor:
        """The lower end of the segment of each step from t_{n+1} to t_n, float64."""
        length = (num_scales - 1) // self.method.segments
        times = grid.karras_grid(self.method, num_scales).to(index.device, non_blocking=True)
        return times[(index - 1) // length * length]
