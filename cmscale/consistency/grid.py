"""Computes times in float64: the Karras grid, the times that losses draw, and those of samplers."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cmscale.config import MethodSection
from cmscale.config.sampling_times import check_steps

GOLDEN = (math.sqrt(5) - 1) / 2
"""An irrational offset: no Karras grid of any size has times at it."""


class HasTimes(Protocol):
    """The noise range and the exponent of the Karras grid, as every method's config has them."""

    @property
    def sigma_min(self) -> float:
        """The least time, epsilon."""
        ...

    @property
    def sigma_max(self) -> float:
        """The largest time, T."""
        ...

    @property
    def rho(self) -> float:
        """The curvature of the grid."""
        ...


def karras_time(diffusion: HasTimes, fraction: Tensor) -> Tensor:
    """The time at `fraction` of the Karras curve, exactly sigma_min at 0 and sigma_max at 1; EDM, equation 5.

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
    edges = torch.special.erf((grid.log() - p_mean) / (math.sqrt(2) * p_std)).to(uniform.device, non_blocking=True)
    cumulative = (edges[1:] - edges[0]) / (edges[-1] - edges[0])
    return 1 + torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(grid) - 2)


def lognormal_time(uniform: Tensor, *, p_mean: float, p_std: float) -> Tensor:
    """t with ln t ~ N(p_mean, p_std^2), float64, by inverse transform sampling; EDM, section 5."""
    # a uniform of exactly 0 would give t = 0: it is replaced by half the spacing of float64 uniforms
    return (p_mean + p_std * torch.special.ndtri(uniform.clamp(min=2.0**-54))).exp()


def truncated_student_time(
    uniform: Tensor, *, p_mean: float, p_std: float, degrees_of_freedom: float, low: float, high: float
) -> Tensor:
    """t in [low, high], float64, where (ln t - p_mean) / p_std has Student's distribution; TCM, section 4.

    By inversion of the distribution function, which is integrated by the trapezoidal rule: with few degrees of freedom
    (TCM takes 0.01) nearly all of Student's distribution lies outside any range, and its closed forms lose all digits.
    """
    logs = torch.linspace(math.log(low), math.log(high), 16385, dtype=torch.float64)
    square = ((logs - p_mean) / p_std) ** 2 / degrees_of_freedom
    density = torch.exp(-(degrees_of_freedom + 1) / 2 * torch.log1p(square))
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum((density[1:] + density[:-1]) / 2, 0)])
    cumulative, logs = (cumulative / cumulative[-1]).to(uniform.device), logs.to(uniform.device)
    above = torch.searchsorted(cumulative, uniform, right=True).clamp(1, len(logs) - 1)
    share = (uniform - cumulative[above - 1]) / (cumulative[above] - cumulative[above - 1])
    return (logs[above - 1] + share * (logs[above] - logs[above - 1])).exp().clamp(low, high)


def neighbours(diffusion: HasTimes, index: Tensor, num_scales: int) -> tuple[Tensor, Tensor]:
    """(t_n, t_{n+1}) of indices n in 1..N-1, float64.

    They are looked up in the whole grid: computed per batch, a sample's time would depend in its last bit on its
    position in the batch.
    """
    times = karras_grid(diffusion, num_scales).to(index.device, non_blocking=True)
    return times[index - 1], times[index]


def ode_sigmas(diffusion: HasTimes, steps: int) -> Tensor:
    """T = s_0 > ... > s_{steps-1} = eps, then 0, [steps + 1] float64; EDM, equation 5. One step leads from T to 0."""
    if steps == 1:
        return torch.tensor([diffusion.sigma_max, 0.0], dtype=torch.float64)
    return torch.cat([karras_grid(diffusion, steps).flip(0), torch.zeros(1, dtype=torch.float64)])


def indexed_sigmas(diffusion: HasTimes, indices: Sequence[int], last: int) -> Tensor:
    """The times at `indices` of the descending Karras grid 0..last, as the released code numbers times."""
    return karras_time(diffusion, (last - torch.tensor(indices, dtype=torch.float64)) / last)


def consistency_sigmas(method: MethodSection, steps: int) -> Tensor:
    """The descending times of `steps` steps of multistep sampling, [steps] float64; the first is T.

    With two steps, the second is the method's published time (`second_time`). Otherwise they are evenly spaced on the
    Karras curve: indices 0..steps-1 of the descending grid 0..steps.

    Raises:
        UserError: the model was trained for another number, or the published time is outside its range.
    """
    check_steps(method, steps)
    if steps != 2:
        return indexed_sigmas(method, range(steps), last=steps)
    second = method.second_time
    if second.sigma is not None:
        return torch.tensor([method.sigma_max, second.sigma], dtype=torch.float64)
    return indexed_sigmas(method, (0, second.index), last=second.last)


def off_grid_times(diffusion: HasTimes, count: int = 100) -> Tensor:
    """`count` ascending times that no Karras grid contains: at (i + golden ratio) / count of the curve, float64."""
    return karras_time(diffusion, (torch.arange(count, dtype=torch.float64) + GOLDEN) / count)
