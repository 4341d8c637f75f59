"""Preconditions a raw network by TrigFlow (sCM, arXiv 2410.11081): its flow F, dF/dt, and its denoiser.

x_t = cos(t) x_0 + sin(t) z, z of standard deviation sd, is cos(t) times EDM's x_0 + sigma n with sigma = sd tan(t).
Then x_t / sd = c_in x_sigma, and EDM's denoiser c_skip x_sigma + c_out raw is cos(t) x_t + sd sin(t) raw: TrigFlow's
f = cos(t) x_t - sin(t) sd F with F = -raw. The weights of an EDM model therefore need no conversion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cmscale.model.denoiser import Raw, c_noise

Time = Literal["angle", "log_sigma"]


@dataclass(frozen=True)
class TrigFlow:
    """A raw network as F(x_t / sd, t); calling it gives f(x, sigma), the denoiser or the consistency function.

    Args:
        time: The input of the time embedding: `angle` is t (sCM, section 4.1), `log_sigma` is 250 ln(sigma), which the
            weights of EDM models expect.
    """

    raw: Raw
    sigma_data: float = 0.5
    time: Time = "angle"

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        labels: Tensor | None = None,
        dropout_keys: Sequence[int] | None = None,
    ) -> Tensor:
        """f for images x [B, C, H, W] with noise of std sigma [B]: cos(t) x_t - sin(t) sd F(x_t / sd, t), float32."""
        t = torch.atan(sigma.double() / self.sigma_data)
        cos, sin = (value.float()[:, None, None, None] for value in (t.cos(), t.sin()))
        x = cos * x.float()
        time = t.float() if self.time == "angle" else c_noise(sigma)
        output = self.raw(x / self.sigma_data, time, labels=labels, dropout_keys=dropout_keys)
        return cos * x + sin * self.sigma_data * output

    def flow(self, x: Tensor, t: Tensor, *, dropout_keys: Sequence[int] | None = None) -> Tensor:
        """F(x, t), x = x_t / sd, t [B] in [0, pi/2]."""
        return -self.raw(x, self._embedded(t), dropout_keys=dropout_keys)

    def weighted_flow(
        self, x: Tensor, t: Tensor, *, dropout_keys: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """F(x, t) and the learned weighting w(t) [B]; the network must be a `WeightedUNet`."""
        output, weight = self.raw(x, self._embedded(t), dropout_keys=dropout_keys, weight_time=t)
        return -output, weight

    @torch.no_grad()
    def flow_and_rate(
        self, x: Tensor, t: Tensor, slope: Tensor, *, dropout_keys: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """F(x_t / sd, t) and cos(t) sin(t) dF/dt along dx_t/dt = slope, by forward-mode differentiation.

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
