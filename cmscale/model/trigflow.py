"""Preconditions a raw network by TrigFlow (sCM, arXiv 2410.11081): its flow F, dF/dt, and its denoiser.

x_t = cos(t) x_0 + sin(t) z, z of standard deviation sd, is cos(t) times EDM's x_0 + sigma n with sigma = sd tan(t).
Then x_t / sd = c_in x_sigma, and EDM's denoiser c_skip x_sigma + c_out raw is cos(t) x_t + sd sin(t) raw: TrigFlow's
f = cos(t) x_t - sin(t) sd F with F = -raw. The weights of an EDM model therefore need no conversion.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cmscale.model.denoiser import Raw, Time, embedded_time
from cmscale.rng import DropoutKeys

Derivative = Literal["jvp", "central_differences", "backward_differences"]

STEP = 0.1
"""Of differences, in ln(tan t): small against the width of the data's features in ln(sigma), large against the
ripple of the time embedding, whose fastest sinusoid turns 4 times within it."""
STENCILS: Mapping[Derivative, tuple[tuple[int, float], ...]] = {
    "central_differences": ((1, 0.5), (-1, -0.5)),
    "backward_differences": ((0, 1.5), (-1, -2.0), (-2, 0.5)),
}
"""Steps along the trajectory and their factors; both are of second order in STEP.

Training changes an error e of F by -(cos^2(t) e + de/du), u = ln(tan t) (see `ContinuousLoss`). Of e = exp(i k u) the
central difference is i sin(k h) / h: above the data's scale, where cos^2(t) is small, nothing damps it, and for
k h > pi / 2 it travels towards small times, not out at the upper end as with the derivative. A time embedding of 250
ln(sigma) has such k. The backward difference has the real part (1 - cos(k h))^2 / h besides, which damps them.
"""


@dataclass(frozen=True)
class TrigFlow:
    """A raw network as F(x_t / sd, t); calling it gives f(x, sigma), the denoiser or the consistency function.

    Args:
        time: The input of the time embedding: `angle` is t (sCM, section 4.1), `log_sigma` is 250 ln(sigma), which the
            weights of EDM models expect.
        derivative: How `flow_and_rate` differentiates.
    """

    raw: Raw
    sigma_data: float = 0.5
    time: Time = "angle"
    derivative: Derivative = "jvp"

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        labels: Tensor | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> Tensor:
        """f for images x [B, C, H, W] with noise of std sigma [B]: cos(t) x_t - sin(t) sd F(x_t / sd, t), float32."""
        t = torch.atan(sigma.double() / self.sigma_data)
        cos, sin = (value.float()[:, None, None, None] for value in (t.cos(), t.sin()))
        x = cos * x.float()
        time = embedded_time(sigma, sigma_data=self.sigma_data, time=self.time)
        output = self.raw(x / self.sigma_data, time, labels=labels, dropout_keys=dropout_keys)
        return cos * x + sin * self.sigma_data * output

    def flow(self, x: Tensor, t: Tensor, *, dropout_keys: DropoutKeys | None = None) -> Tensor:
        """F(x, t), x = x_t / sd, t [B] in [0, pi/2]."""
        return -self.raw(x, self._embedded(t).to(x.dtype), dropout_keys=dropout_keys)

    def weighted_flow(self, x: Tensor, t: Tensor, *, dropout_keys: DropoutKeys | None = None) -> tuple[Tensor, Tensor]:
        """F(x, t) and the learned weighting w(t) [B]; the network must be a `WeightedUNet`."""
        output, weight = self.raw(x, self._embedded(t), dropout_keys=dropout_keys, weight_time=t)
        return -output, weight

    @torch.no_grad()
    def flow_and_rate(
        self, x: Tensor, t: Tensor, slope: Tensor, *, dropout_keys: DropoutKeys | None = None
    ) -> tuple[Tensor, Tensor]:
        """F(x, t) and cos(t) sin(t) dF/dt along the trajectory through x = x_t / sd with dx_t/dt = slope.

        Args:
            x: [B, ...].
            t: [B] in (0, pi/2).
        """
        if self.derivative == "jvp":
            return self._by_forward_mode(x, t, slope, dropout_keys=dropout_keys)
        return self._by_differences(x, t, slope, dropout_keys=dropout_keys)

    def _by_differences(
        self, x: Tensor, t: Tensor, slope: Tensor, *, dropout_keys: DropoutKeys | None
    ) -> tuple[Tensor, Tensor]:
        """The differences of F(x_k, t_k) with tan(t_k) = tan(t) e^{kh}, as cos(t) sin(t) dt = d ln(tan t).

        x_k = cos(d) x + sin(d) slope / sd with d = t_k - t: the trajectory of constant x_0 and z through x.
        """
        value = self.flow(x, t, dropout_keys=dropout_keys)
        difference = torch.zeros_like(value)
        for steps, factor in STENCILS[self.derivative]:
            if steps == 0:
                difference = difference + factor * value
                continue
            angle = torch.atan(torch.tan(t.double()) * math.exp(steps * STEP))
            turn = (angle - t.double()).reshape(-1, *[1] * (x.ndim - 1))
            place = (turn.cos() * x + turn.sin() * slope / self.sigma_data).to(x)
            difference = difference + factor * self.flow(place, angle, dropout_keys=dropout_keys)
        return value, difference / STEP

    def _by_forward_mode(
        self, x: Tensor, t: Tensor, slope: Tensor, *, dropout_keys: DropoutKeys | None
    ) -> tuple[Tensor, Tensor]:
        """The derivative at a point, in one pass.

        The tangents are multiplied by cos(t) sin(t) before the network, not after, to stay bounded; sCM, section 5.1.
        """
        factor = t.cos() * t.sin()
        x_tangent = factor.reshape(-1, *[1] * (x.ndim - 1)) * slope / self.sigma_data
        # d(250 ln(sd tan t))/dt = 250 / (sin(t) cos(t))
        time_tangent = factor if self.time == "angle" else torch.full_like(t, 250.0)
        with forward_ad.dual_level():
            time = forward_ad.make_dual(self._embedded(t), time_tangent)
            output = self.raw(forward_ad.make_dual(x, x_tangent), time, dropout_keys=dropout_keys)
            value, rate = forward_ad.unpack_dual(output)
        return -value, torch.zeros_like(value) if rate is None else -rate

    def _embedded(self, t: Tensor) -> Tensor:
        """The input of the time embedding."""
        return t if self.time == "angle" else 250 * torch.log(self.sigma_data * torch.tan(t))
