"""Owns the losses of iCT (arXiv 2310.14189) and ECT (arXiv 2406.14548): weighted, with no target network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import ECT, ICT
from cmscale.config.schedules import Point
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import evaluate, like
from cmscale.rng import SampleRandomness


@dataclass(frozen=True)
class ICTLoss:
    """d(f(x + t_{n+1} z, t_{n+1}), sg f(x + t_n z, t_n)) / (t_{n+1} - t_n), n lognormal; iCT, table 1."""

    method: ICT
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, point: Point, random: SampleRandomness) -> Tensor:
        assert point.num_scales is not None
        times = grid.karras_grid(self.method, point.num_scales)
        p_mean, p_std = self.method.p_mean, self.method.p_std
        index = grid.lognormal_index(random.uniform("time"), times, p_mean=p_mean, p_std=p_std)
        lower, upper = grid.neighbours(self.method, index, point.num_scales)
        noise = random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        with torch.no_grad():
            less_noisy = clean + like(lower, clean) * noise
            aim = evaluate(networks.target_or_student, less_noisy, lower, dropout_keys=keys)
        estimate = evaluate(networks.student, clean + like(upper, clean) * noise, upper, dropout_keys=keys)
        return self.distance(estimate, aim) / (upper - lower).to(clean)


def ect_lower_time(time: Tensor, *, stage: int, q: float, k: float, b: float) -> Tensor:
    """r = t (1 - q^-(stage+1) (1 + k sigmoid(-b t))), clipped at 0; ECT, section 3.2."""
    return time * (1 - q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * time))).clamp(min=0)


@dataclass(frozen=True)
class ECTLoss:
    """d(f(x + t z, t), sg f(x + r z, r)) / (t - r), ln t ~ N(Pm, Ps^2); r = 0: target x; ECT, section 3."""

    method: ECT
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, point: Point, random: SampleRandomness) -> Tensor:
        assert point.stage is not None
        method = self.method
        upper = grid.lognormal_time(random.uniform("time"), p_mean=method.p_mean, p_std=method.p_std)
        lower = ect_lower_time(upper, stage=point.stage, q=method.q, k=method.k, b=method.b)
        noise = random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        with torch.no_grad():
            # Every sample is evaluated, also where r = 0 makes the clean image the target: were a rank to
            # skip the pass, the others would wait in its collectives for ever (ZeRO-3).
            safe = torch.where(lower > 0, lower, upper)
            aim = evaluate(networks.target_or_student, clean + like(safe, clean) * noise, safe, dropout_keys=keys)
            aim = torch.where(like(lower, clean) > 0, aim, clean)
        estimate = evaluate(networks.student, clean + like(upper, clean) * noise, upper, dropout_keys=keys)
        return self.distance(estimate, aim) / (upper - lower).to(clean)
