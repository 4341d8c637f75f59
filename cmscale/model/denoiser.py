"""Owns the preconditioning: how a raw network becomes a denoiser or a consistency function of (x, sigma)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Raw = Callable[..., Tensor]


def c_noise(sigma: Tensor) -> Tensor:
    """What the time embedding is given: 1000 / 4 ln(sigma + 1e-44), [B] float32.

    In float32 throughout, as the released code has it: at sigma = 80 one unit in the last place moves the
    fastest sinusoid by 1e-4, more than outputs may differ.
    """
    return 1000 * 0.25 * torch.log(sigma.float() + 1e-44)


@dataclass(frozen=True)
class _Preconditioned(ABC):
    """c_out F(c_in x, c_noise) + c_skip x; coefficients from float64, products in float32."""

    raw: Raw
    sigma_data: float = 0.5

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        labels: Tensor | None = None,
        dropout_keys: Sequence[int] | None = None,
    ) -> Tensor:
        """What the class says it gives, of noisy images x and their noise's std sigma [B]; [B, C, H, W] float32."""
        c_skip, c_out = self.coefficients(sigma)
        c_in = (sigma.double() ** 2 + self.sigma_data**2).rsqrt()
        skip, out, scaled = (value.float()[:, None, None, None] for value in (c_skip, c_out, c_in))
        x = x.float()
        return out * self.raw(scaled * x, c_noise(sigma), labels=labels, dropout_keys=dropout_keys) + skip * x

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, float64."""


@dataclass(frozen=True)
class EDMDenoiser(_Preconditioned):
    """The denoiser of a diffusion model, D(x, sigma): the clean image in x (Karras et al. 2022, eq. 7, table 1)."""

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, float64."""
        sigma = sigma.double()
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt()


@dataclass(frozen=True)
class ConsistencyDenoiser(_Preconditioned):
    """The consistency function f(x, sigma): where the trajectory through x at time sigma begins.

    f(x, sigma_min) = x, exactly (Song et al. 2023, equation 5, appendix C).
    """

    sigma_min: float = 0.002

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, float64; exactly 1 and 0 where sigma is sigma_min in sigma's own precision."""
        boundary = torch.tensor(self.sigma_min, dtype=sigma.dtype, device=sigma.device).double()
        sigma = sigma.double()
        c_skip = self.sigma_data**2 / ((sigma - boundary) ** 2 + self.sigma_data**2)
        c_out = self.sigma_data * (sigma - boundary) / (sigma**2 + self.sigma_data**2).sqrt()
        return c_skip, c_out
