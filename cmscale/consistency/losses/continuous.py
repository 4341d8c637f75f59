"""The loss that sCT and sCD share: continuous-time consistency training with TrigFlow (arXiv 2410.11081).

With x_t = cos(t) x_0 + sin(t) z and f = cos(t) x_t - sin(t) sd F:

    df/dt = -cos(t) (sd F - dx_t/dt) - sin(t) (x_t + sd dF/dt)

A step towards f(x_t, t) = f(x_s, s) descends w(t) <f, df-/dt>, whose gradient is -w(t) sin(t) sd <grad F, df-/dt>.
The prior weight w = 1 / (sd tan t) makes that -<grad F, cos(t) df-/dt>: the prior is the factor cos(t) in g below.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cmscale.config import SCD, SCT
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.losses.base import Measure, unmeasured
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import expand_as
from cmscale.rng import SampleRandomness


@runtime_checkable
class Flow(Protocol):
    """A network F(x_t / sd, t): its value, its value with the learned weighting, and its derivative along a slope."""

    def flow(self, x: Tensor, t: Tensor, *, dropout_keys: object = None) -> Tensor:
        """F at x_t / sd [B, C, H, W] and t [B]."""
        ...

    def weighted_flow(self, x: Tensor, t: Tensor, *, dropout_keys: object = None) -> tuple[Tensor, Tensor]:
        """F, and the learned weighting w(t) [B]."""
        ...

    def flow_and_rate(
        self, x: Tensor, t: Tensor, slope: Tensor, *, dropout_keys: object = None
    ) -> tuple[Tensor, Tensor]:
        """F, and cos(t) sin(t) dF/dt along the trajectory with dx_t/dt = `slope`."""
        ...


def tangent(
    flow: Tensor, rate: Tensor, x: Tensor, slope: Tensor, t: Tensor, *, sigma_data: float, ratio: float
) -> Tensor:
    """g = -cos^2(t) (sd F - dx/dt) - r (cos(t) sin(t) x + sd rate), rate = cos(t) sin(t) dF/dt; sCM, algorithm 1.

    At r = 1 it is cos(t) df/dt; at r = 0, where the warm-up starts, it is the residual of the diffusion model.
    """
    cos, sin = expand_as(t.cos(), x), expand_as(t.sin(), x)
    return -(cos**2) * (sigma_data * flow - slope) - ratio * (cos * sin * x + sigma_data * rate)


@dataclass(frozen=True)
class ContinuousLoss(ABC):
    """e^{w(t)} / D ||F - F- - g / (||g|| + c)||^2 - w(t), ln(sd tan t) ~ N(Pm, Ps^2); sCM, equation 8.

    F- is the student without gradient. Subclasses define dx_t/dt. The loss is near 1 - w whatever the network learns,
    so it measures `tangent_norm`, ||g|| before it is normalised, and `weighting`, w.

    Normalising weights a time by p / ||g||, p the density of u = ln(sd tan t). An error e of F changes by
    -(cos^2(t) e + de/du), whose mean square under these weights shrinks for every e only where
    d ln(p / ||g||) / du < 2 cos^2(t). Above the data's scale ||g|| falls as 1 / sigma, so p must fall at least as fast
    there: with Pm = 0, Ps = 1.9 in place of the paper's -1, 1.4 training drifts away at small times.
    """

    method: SCT | SCD
    measure: Measure = unmeasured

    @abstractmethod
    def slope(self, networks: Networks, x: Tensor, t: Tensor, *, clean: Tensor, noise: Tensor) -> Tensor:
        """dx_t/dt of the trajectory through x at times t, [B] float64; `noise` has standard deviation sd."""

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        method, student = self.method, networks.student
        assert isinstance(student, Flow)
        sd = method.sigma_data
        sigma = grid.lognormal_time(random.uniform(), p_mean=method.p_mean, p_std=method.p_std)
        t = torch.atan(sigma / sd)
        noise = sd * random.noise(clean.shape[1:]).to(clean)
        keys = random.dropout_keys()
        x = expand_as(t.cos(), clean) * clean + expand_as(t.sin(), clean) * noise
        time = t.to(clean)
        with torch.no_grad():
            slope = self.slope(networks, x, t, clean=clean, noise=noise)
            before, rate = student.flow_and_rate(x / sd, time, slope, dropout_keys=keys)
            g = tangent(before, rate, x, slope, t, sigma_data=sd, ratio=method.tangent_ratio(values.step))
            length = g.flatten(1).norm(dim=1)
            g = g / (length.reshape(-1, *[1] * (g.ndim - 1)) + method.tangent_norm_c)
        estimate, weight = student.weighted_flow(x / sd, time, dropout_keys=keys)
        self.measure("tangent_norm", length)
        self.measure("weighting", weight)
        square = (estimate - estimate.detach() - g).square().flatten(1).mean(1)
        return weight.exp() * square - weight
