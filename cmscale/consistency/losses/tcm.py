"""The loss of TCM: consistency training on large times, bounded by a frozen first stage (arXiv 2410.14895)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import TCM
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import evaluate, expand_as
from cmscale.rng import SampleRandomness


@dataclass(frozen=True)
class TCMLoss:
    """lambda d(f(x + t z, t), sg f^(x + r z, r)) for t >= t', f^ = f where r >= t', else the first stage; TCM, eq. 7.

    r = t (1 - gap (1 + k sigmoid(-b t))), ECT's in the last stage of its curriculum; lambda as in ECT. A share of the
    samples has t = t': their mean and that of the others are added, the former times `boundary_weight`.
    """

    method: TCM
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        del values
        assert networks.teacher is not None, "TCM needs its first stage"
        method = self.method
        upper, is_boundary = self._times(random.uniform())
        lower = upper * (1 - method.gap * (1 + method.k * torch.sigmoid(-method.b * upper))).clamp(min=0)
        noise = random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        with torch.no_grad():
            # Both networks are evaluated for all samples: if one rank left out a pass, the others would block in its
            # collectives (ZeRO-3).
            less_noisy = clean + expand_as(lower, clean) * noise
            first = evaluate(networks.teacher, less_noisy, lower)
            own = evaluate(networks.target_or_student, less_noisy, lower, dropout_keys=keys)
            target = torch.where(expand_as(lower, clean) < method.sigma_min, first, own)
        estimate = evaluate(networks.student, clean + expand_as(upper, clean) * noise, upper, dropout_keys=keys)
        if method.weighting == "edm":
            weight = 1 / upper**2 + 1 / method.sigma_data**2
        else:
            weight = 1 / (upper - lower)
        share = method.boundary_share
        weight = weight * torch.where(is_boundary, method.boundary_weight / share, 1 / (1 - share))
        return weight.to(clean) * self.distance(estimate, target)

    def _times(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """t of each sample, float64, and whether it is one of those at t'."""
        method = self.method
        is_boundary = uniform < method.boundary_share
        rest = (uniform - method.boundary_share) / (1 - method.boundary_share)
        drawn = grid.truncated_student_time(
            rest.clamp(min=0),
            p_mean=method.p_mean,
            p_std=method.p_std,
            degrees_of_freedom=method.degrees_of_freedom,
            low=method.sigma_min,
            high=method.sigma_max,
        )
        return torch.where(is_boundary, method.sigma_min, drawn), is_boundary
