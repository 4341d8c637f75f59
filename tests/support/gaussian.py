"""Computes the denoiser and the probability flow of Gaussian data N(m, S) in closed form, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Vectors from N(mean, U diag(variances) U^T) with their exact `denoise` and `solve`."""

    mean: Tensor
    axes: Tensor
    variances: Tensor

    @classmethod
    def random(cls, dimension: int, seed: int) -> "Gaussian":
        source = torch.Generator().manual_seed(seed)
        axes, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=source, dtype=torch.float64))
        variances = torch.rand(dimension, generator=source, dtype=torch.float64) * 0.4 + 0.01
        return cls(torch.randn(dimension, generator=source, dtype=torch.float64) * 0.3, axes, variances)

    def sample(self, count: int, seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        white = torch.randn(count, len(self.mean), generator=source, dtype=torch.float64)
        return self.mean + (white * self.variances.sqrt()) @ self.axes.T

    def _scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        return self.mean + ((x - self.mean) @ self.axes * factor) @ self.axes.T

    def denoise(self, x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
        """E[x0 | x at sigma] = m + S (S + sigma^2)^-1 (x - m)."""
        square = sigma.double()[:, None] ** 2
        return self._scaled(x.double(), self.variances / (self.variances + square)).to(x)

    def solve(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The point at time s of the trajectory through x at t: m + sqrt((S + s^2) (S + t^2)^-1) (x - m)."""
        ratio = (self.variances + s.double()[:, None] ** 2) / (self.variances + t.double()[:, None] ** 2)
        return self._scaled(x.double(), ratio.sqrt()).to(x)

    def consistency(self, x: Tensor, sigma: Tensor, *, sigma_min: float = 0.002, dropout_keys: object = None) -> Tensor:
        return self.solve(x, sigma, torch.full_like(sigma, sigma_min))
