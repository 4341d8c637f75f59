"""Preconditions a raw network into a denoiser or a consistency function of (x, sigma)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmscale.config import NOISE_EMBEDDING_SCALE
from cmscale.rng import DropoutKeys

Raw = Callable[..., Tensor]


def c_noise(sigma: Tensor) -> Tensor:
    """The input of the time embedding: 1000 / 4 ln(sigma + 1e-44), [B] float32.

    Computed in float32 like the released code: at sigma = 80 one unit in the last place changes the fastest sinusoid
    by 1e-4, which is more than the outputs may differ from that code.
    """
    return NOISE_EMBEDDING_SCALE * 0.25 * torch.log(sigma.float() + 1e-44)


Time = Literal["log_sigma", "angle"]
"""The input of the time embedding: `log_sigma` is c_noise, `angle` is TrigFlow's t = atan(sigma / sigma_data)."""


def embedded_time(sigma: Tensor, *, sigma_data: float, time: Time) -> Tensor:
    """The input of the time embedding at sigma, [B] float32."""
    if time == "angle":
        return torch.atan(sigma.double() / sigma_data).float()
    return c_noise(sigma)


@dataclass(frozen=True)
class _Preconditioned(ABC):
    """c_out F(c_in x, time) + c_skip x, with coefficients computed in float64 and products in float32."""

    raw: Raw
    sigma_data: float = 0.5
    time: Time = "log_sigma"

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        labels: Tensor | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> Tensor:
        """The function of the class for images x [B, C, H, W] with noise of std sigma [B]; [B, C, H, W] float32."""
        c_skip, c_out = self.coefficients(sigma)
        c_in = (sigma.double() ** 2 + self.sigma_data**2).rsqrt()
        skip, out, scaled = (value.float()[:, None, None, None] for value in (c_skip, c_out, c_in))
        x = x.float()
        time = embedded_time(sigma, sigma_data=self.sigma_data, time=self.time)
        return out * self.raw(scaled * x, time, labels=labels, dropout_keys=dropout_keys) + skip * x

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, float64."""


@dataclass(frozen=True)
class EDMDenoiser(_Preconditioned):
    """The denoiser D(x, sigma) of a diffusion model, an estimate of the clean image; EDM, equation 7 and table 1."""

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, float64."""
        sigma = sigma.double()
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt()


@dataclass(frozen=True)
class ConsistencyDenoiser(_Preconditioned):
    """The consistency function f(x, sigma): the start, at sigma_min, of the trajectory through x at time sigma.

    f(x, sigma_min) = x exactly; Consistency Models, equation 5 and appendix C.
    """

    sigma_min: float = 0.002

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, float64; exactly 1 and 0 where sigma is sigma_min in sigma's dtype."""
        boundary = torch.full((), self.sigma_min, dtype=sigma.dtype, device=sigma.device).double()
        sigma = sigma.double()
        c_skip = self.sigma_data**2 / ((sigma - boundary) ** 2 + self.sigma_data**2)
        c_out = self.sigma_data * (sigma - boundary) / (sigma**2 + self.sigma_data**2).sqrt()
        return c_skip, c_out
