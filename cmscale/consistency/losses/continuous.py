"""Owns the loss of continuous-time consistency models, sCT and sCD (arXiv 2410.11081), in TrigFlow's terms.

With x_t = cos(t) x_0 + sin(t) z and f = cos(t) x_t - sin(t) sd F:

    df/dt = -cos(t) (sd F - dx_t/dt) - sin(t) (x_t + sd dF/dt)

A step towards f(x_t, t) = f(x_s, s) descends w(t) <f, df-/dt>, whose gradient is -w(t) sin(t) sd <grad F, df-/dt>.
The prior weight w = 1 / (sd tan t) makes that -<grad F, cos(t) df-/dt>: the prior is the factor cos(t) in g below.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cmscale.config import SCD, SCT, schedules
from cmscale.config.schedules import Point
from cmscale.consistency import grid
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import like
from cmscale.rng import SampleRandomness


@runtime_checkable
class Flow(Protocol):
    """What the loss needs of a network: F(x_t / sd, t), with its weighting, with its rate along a slope."""

    def flow(self, x: Tensor, t: Tensor, *, dropout_keys: object = None) -> Tensor: ...
    def weighted_flow(self, x: Tensor, t: Tensor, *, dropout_keys: object = None) -> tuple[Tensor, Tensor]: ...
    def flow_and_rate(
        self, x: Tensor, t: Tensor, slope: Tensor, *, dropout_keys: object = None
    ) -> tuple[Tensor, Tensor]: ...


def tangent(
    flow: Tensor, rate: Tensor, x: Tensor, slope: Tensor, t: Tensor, *, sigma_data: float, ratio: float
) -> Tensor:
    """g = -cos^2(t) (sd F - dx/dt) - r (cos(t) sin(t) x + sd rate), rate = cos(t) sin(t) dF/dt; sCM, algorithm 1.

    At r = 1 it is cos(t) df/dt. r warms up from 0, where g is the diffusion model's own residual.
    """
    cos, sin = like(t.cos(), x), like(t.sin(), x)
    return -(cos**2) * (sigma_data * flow - slope) - ratio * (cos * sin * x + sigma_data * rate)


@dataclass(frozen=True)
class ContinuousLoss:
    """e^{w(t)} / D ||F - F- - g / (||g|| + c)||^2 - w(t), ln(sd tan t) ~ N(Pm, Ps^2); sCM, equation 8.

    dx_t/dt is cos(t) z - sin(t) x_0 (sCT), or the teacher's sd F (sCD). F- is the student without gradient.
    """

    method: SCT | SCD

    def __call__(self, networks: Networks, clean: Tensor, point: Point, random: SampleRandomness) -> Tensor:
        method, student = self.method, networks.student
        assert isinstance(student, Flow)
        sd = method.sigma_data
        sigma = grid.lognormal_time(random.uniform("time"), p_mean=method.p_mean, p_std=method.p_std)
        t = torch.atan(sigma / sd)
        noise = sd * random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        cos, sin = like(t.cos(), clean), like(t.sin(), clean)
        x, time = cos * clean + sin * noise, t.to(clean)
        with torch.no_grad():
            if isinstance(method, SCD):
                assert isinstance(networks.teacher, Flow), "sCD needs a teacher"
                slope = sd * networks.teacher.flow(x / sd, time)
            else:
                slope = cos * noise - sin * clean
            before, rate = student.flow_and_rate(x / sd, time, slope, dropout_keys=keys)
            ratio = schedules.tangent_ratio(point.step, warmup_steps=method.tangent_warmup_steps)
            g = tangent(before, rate, x, slope, t, sigma_data=sd, ratio=ratio)
            length = g.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1))
            g = g / (length + method.tangent_norm_c)
        estimate, weight = student.weighted_flow(x / sd, time, dropout_keys=keys)
        square = (estimate - estimate.detach() - g).square().flatten(1).mean(1)
        return weight.exp() * square - weight
