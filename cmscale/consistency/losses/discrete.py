"""Owns the losses of EDM, CD and CT, and `build_loss`, which knows every method's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import CD, CT, ECT, EDM, ICT, PD, SCD, SCT, Method
from cmscale.config.schedules import Point
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.losses import improved
from cmscale.consistency.losses.continuous import ContinuousLoss
from cmscale.consistency.losses.progressive import ProgressiveLoss
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import STEPS, evaluate, like
from cmscale.rng import SampleRandomness

Loss = Callable[[Networks, Tensor, Point, SampleRandomness], Tensor]
"""(networks, clean [B, C, H, W] in [-1, 1], point, random) -> loss of each sample [B], float32."""


def build_loss(method: Method, distance: Distance) -> Loss:
    """The loss of a method, its distance from `build_distance` of the same method."""
    match method:
        case EDM():
            return EDMLoss(method, distance)
        case CD() | CT():
            return DiscreteLoss(method, distance)
        case ICT():
            return improved.ICTLoss(method, distance)
        case ECT():
            return improved.ECTLoss(method, distance)
        case SCT() | SCD():
            return ContinuousLoss(method)
        case PD():
            return ProgressiveLoss(method, distance)


@dataclass(frozen=True)
class EDMLoss:
    """lambda(s) d(D(x + s z, s), x), lambda = 1/s^2 + 1/sd^2, ln s ~ N(Pm, Ps^2); EDM, section 5.

    d is the mean square over the image, as in the released codes.
    """

    method: EDM
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, _point: Point, random: SampleRandomness) -> Tensor:
        sigma = grid.lognormal_time(random.uniform("time"), p_mean=self.method.p_mean, p_std=self.method.p_std)
        noise = random.noise(clean.shape[1:]).to(clean)
        noisy = clean + like(sigma, clean) * noise
        denoised = evaluate(networks.student, noisy, sigma, dropout_keys=random.dropout_keys())
        weight = 1 / sigma**2 + 1 / self.method.sigma_data**2
        return weight.to(clean) * self.distance(denoised, clean)


@dataclass(frozen=True)
class DiscreteLoss:
    """lambda d(f(x_{n+1}, t_{n+1}), f-(x_n, t_n)), x_{n+1} = x + t_{n+1} z; Consistency Models.

    CD (algorithm 2, equation 7): x_n is one step of the ODE solver with the teacher from x_{n+1}. CT
    (algorithm 3, equation 10): x_n = x + t_n z with the same z. Student and target are given the same dropout
    keys; the teacher drops nothing. lambda is 1, as the paper has it; CT's `weighting: inverse_gap` is iCT's
    1 / (t_{n+1} - t_n).
    """

    method: CD | CT
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, point: Point, random: SampleRandomness) -> Tensor:
        assert point.num_scales is not None
        index = grid.uniform_index(random.uniform("time"), point.num_scales)
        lower, upper = grid.neighbours(self.method, index, point.num_scales)
        noise = random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        noisy = clean + like(upper, clean) * noise
        with torch.no_grad():
            if isinstance(self.method, CD):
                assert networks.teacher is not None, "CD needs a teacher"
                less_noisy = STEPS[self.method.solver](networks.teacher, noisy, upper, lower)
            else:
                less_noisy = clean + like(lower, clean) * noise
            aim = evaluate(networks.target_or_student, less_noisy, lower, dropout_keys=keys)
        distance = self.distance(evaluate(networks.student, noisy, upper, dropout_keys=keys), aim)
        if isinstance(self.method, CT) and self.method.weighting == "inverse_gap":
            return distance / (upper - lower).to(distance)
        return distance
