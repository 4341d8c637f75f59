"""Times: the Karras grid, and the times that training draws and samplers take; all float64."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cmscale.config import MethodSection

GOLDEN = (math.sqrt(5) - 1) / 2
"""An irrational offset: times at it lie on no Karras grid, whatever its N."""


class HasTimes(Protocol):
    """What the grid needs of a method: the noise range and the grid's exponent."""

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    @property
    def rho(self) -> float: ...


def karras_time(diffusion: HasTimes, fraction: Tensor) -> Tensor:
    """The time at `fraction` of the Karras curve: 0 is sigma_min, 1 sigma_max, exactly; EDM, equation 5.

    t = (eps^(1/rho) + fraction (T^(1/rho) - eps^(1/rho)))^rho, float64, of fraction's shape.
    """
    fraction = fraction.to(torch.float64)
    low, high = diffusion.sigma_min ** (1 / diffusion.rho), diffusion.sigma_max ** (1 / diffusion.rho)
    time = (low + fraction * (high - low)) ** diffusion.rho
    time = torch.where(fraction == 0, diffusion.sigma_min, time)
    return torch.where(fraction == 1, diffusion.sigma_max, time)


def karras_grid(diffusion: HasTimes, num_scales: int) -> Tensor:
    """t_1 = eps < ... < t_N = T, [N] float64; Consistency Models, section 2."""
    return karras_time(diffusion, torch.arange(num_scales, dtype=torch.float64) / (num_scales - 1))


def uniform_index(uniform: Tensor, num_scales: int) -> Tensor:
    """n uniform on 1..N-1 from uniforms on [0, 1); Consistency Models, algorithms 2 and 3."""
    return 1 + (uniform * (num_scales - 1)).floor().clamp(max=num_scales - 2).long()


def lognormal_index(uniform: Tensor, grid: Tensor, *, p_mean: float, p_std: float) -> Tensor:
    """n on 1..N-1, p(n) ~ erf(u_{n+1}) - erf(u_n), u_n = (ln t_n - Pm)/(sqrt2 Ps); iCT, section 3.5."""
    edges = torch.special.erf((grid.log() - p_mean) / (math.sqrt(2) * p_std)).to(uniform.device)
    cumulative = (edges[1:] - edges[0]) / (edges[-1] - edges[0])
    return 1 + torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(grid) - 2)


def lognormal_time(uniform: Tensor, *, p_mean: float, p_std: float) -> Tensor:
    """t with ln t ~ N(p_mean, p_std^2), float64, by the inverse distribution; EDM, section 5."""
    # A uniform of exactly 0 would give t = 0: take half the smallest step of a float64 uniform in its place.
    return (p_mean + p_std * torch.special.ndtri(uniform.clamp(min=2.0**-54))).exp()


def neighbours(diffusion: HasTimes, index: Tensor, num_scales: int) -> tuple[Tensor, Tensor]:
    """(t_n, t_{n+1}) of indices n in 1..N-1, float64.

    Read from the whole grid: powers taken of a batch differ in the last bit with a sample's place in it.
    """
    times = karras_grid(diffusion, num_scales).to(index.device)
    return times[index - 1], times[index]


def ode_sigmas(diffusion: HasTimes, steps: int) -> Tensor:
    """T = s_0 > ... > s_{steps-1} = eps, then 0, [steps + 1] float64; EDM, equation 5."""
    return torch.cat([karras_grid(diffusion, steps).flip(0), torch.zeros(1, dtype=torch.float64)])


def indexed_sigmas(diffusion: HasTimes, indices: Sequence[int], last: int) -> Tensor:
    """The times at `indices` of the descending Karras grid 0..last: the released code's names of times."""
    return karras_time(diffusion, (last - torch.tensor(indices, dtype=torch.float64)) / last)


def consistency_sigmas(method: MethodSection, steps: int) -> Tensor:
    """The times of `steps` steps of algorithm 1, descending from T, [steps] float64.

    One step: T. Two: the method's published second time. Otherwise they are even on the Karras curve: the indices
    0..steps-1 of the descending grid 0..steps.
    """
    if steps != 2:
        return indexed_sigmas(method, range(steps), last=steps)
    second = method.second_time
    if second.sigma is not None:
        return torch.tensor([method.sigma_max, second.sigma], dtype=torch.float64)
    return indexed_sigmas(method, (0, second.index), last=second.last)


def held_out_times(diffusion: HasTimes, count: int = 100) -> Tensor:
    """`count` ascending times on no Karras grid: at (i + golden ratio) / count of the curve, float64."""
    return karras_time(diffusion, (torch.arange(count, dtype=torch.float64) + GOLDEN) / count)
