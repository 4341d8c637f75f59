"""The loss of ECT: continuous times with a shrinking gap and no target network (arXiv 2406.14548)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import ECT
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import evaluate, expand_as
from cmscale.rng import SampleRandomness


def ect_lower_time(time: Tensor, *, stage: int, q: float, k: float, b: float) -> Tensor:
    """r = t (1 - q^-(stage+1) (1 + k sigmoid(-b t))), clipped at 0; ECT, section 3.2."""
    return time * (1 - q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * time))).clamp(min=0)


@dataclass(frozen=True)
class ECTLoss:
    """lambda d(f(x + t z, t), sg f(x + r z, r)), ln t ~ N(Pm, Ps^2); the target is x where r = 0; ECT, section 3.

    lambda is 1 / (t - r); with `weighting: edm` 1 / t^2 + 1 / sd^2, which the authors take for ImageNet 64.
    """

    method: ECT
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        assert values.stage is not None
        method = self.method
        upper = grid.lognormal_time(random.uniform(), p_mean=method.p_mean, p_std=method.p_std)
        lower = ect_lower_time(upper, stage=values.stage, q=method.q, k=method.k, b=method.b)
        noise = random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        with torch.no_grad():
            # The network is evaluated even if r = 0 makes the clean image every target: if one rank skipped the pass,
            # the others would block in its collectives (ZeRO-3).
            time = torch.where(lower > 0, lower, upper)
            noisy = clean + expand_as(time, clean) * noise
            target = evaluate(networks.target_or_student, noisy, time, dropout_keys=keys)
            target = torch.where(expand_as(lower, clean) > 0, target, clean)
        estimate = evaluate(networks.student, clean + expand_as(upper, clean) * noise, upper, dropout_keys=keys)
        distance = self.distance(estimate, target)
        if method.weighting == "edm":
            return (1 / upper**2 + 1 / method.sigma_data**2).to(clean) * distance
        return distance / (upper - lower).to(clean)
