"""Owns TrigFlow's view of a raw network (sCM, arXiv 2410.11081): its flow, the flow's rate, and its denoiser.

x_t = cos(t) x_0 + sin(t) z, z of standard deviation sd, is cos(t) times EDM's x_0 + sigma n with sigma = sd tan(t).
Then x_t / sd = c_in x_sigma, and EDM's denoiser c_skip x_sigma + c_out raw is cos(t) x_t + sd sin(t) raw: TrigFlow's
f = cos(t) x_t - sin(t) sd F with F = -raw. So a diffusion model's weights are a TrigFlow network's as they are.
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
    """A raw network as F(x_t / sd, t), of which f(x, sigma) is the denoiser, or the consistency function.

    Args:
        time: What the network is told of t: t itself (sCM, section 4.1), or 250 ln(sigma), as EDM weights expect.
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
        """f at x whose noise has std sigma [B]: cos(t) x_t - sin(t) sd F(x_t / sd, t), [B, C, H, W] float32."""
        t = torch.atan(sigma.double() / self.sigma_data)
        cos, sin = (value.float()[:, None, None, None] for value in (t.cos(), t.sin()))
        x = cos * x.float()
        time = t.float() if self.time == "angle" else c_noise(sigma)
        output = self.raw(x / self.sigma_data, time, labels=labels, dropout_keys=dropout_keys)
        return cos * x + sin * self.sigma_data * output

    def flow(self, x: Tensor, t: Tensor, *, dropout_keys: Sequence[int] | None = None) -> Tensor:
        """F(x, t), x = x_t / sd, t [B] in [0, pi/2]."""
        return -self.raw(x, self._told(t), dropout_keys=dropout_keys)

    def weighted_flow(
        self, x: Tensor, t: Tensor, *, dropout_keys: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """F(x, t) and the learned weighting w(t) [B], of a network that has one."""
        output, weight = self.raw(x, self._told(t), dropout_keys=dropout_keys, weight_time=t)
        return -output, weight

    @torch.no_grad()
    def flow_and_rate(
        self, x: Tensor, t: Tensor, slope: Tensor, *, dropout_keys: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """F(x_t / sd, t) and cos(t) sin(t) dF/dt along dx_t/dt = slope, by forward-mode differentiation.

        The factor goes in before the network, as sCM has it (section 5.1): what goes through stays bounded.
        """
        factor = t.cos() * t.sin()
        moved = factor.reshape(-1, *[1] * (x.ndim - 1)) * slope / self.sigma_data
        # d(250 ln(sd tan t))/dt = 250 / (sin(t) cos(t))
        pace = factor if self.time == "angle" else torch.full_like(t, 250.0)
        with forward_ad.dual_level():
            told = forward_ad.make_dual(self._told(t), pace)
            output = self.raw(forward_ad.make_dual(x, moved), told, dropout_keys=dropout_keys)
            value, rate = forward_ad.unpack_dual(output)
        return -value, torch.zeros_like(value) if rate is None else -rate

    def _told(self, t: Tensor) -> Tensor:
        return t if self.time == "angle" else 250 * torch.log(self.sigma_data * torch.tan(t))
