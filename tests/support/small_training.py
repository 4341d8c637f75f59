"""Trains small networks by each method on Gaussian data, for which the consistency function is known."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from gaussian import Gaussian
from torch import Tensor, nn

from cmscale.config import ECT, EDM, ICT, MCD, TCM, Method, schedules
from cmscale.consistency.distance import l2, pseudo_huber
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import Denoise
from cmscale.rng import SampleRandomness

DIMENSION = 2
RANGE = {"sigma_min": 0.02, "sigma_max": 10.0}


@dataclass(frozen=True)
class BatchRandomness(SampleRandomness):
    """Draws a whole batch from one generator, as one keyed generator per sample would be too slow here."""

    def _source(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + len(purpose))

    def noise(self, shape) -> Tensor:
        return torch.randn(len(self.positions), *shape, generator=self._source("noise"))

    def uniform(self) -> Tensor:
        return torch.rand(len(self.positions), generator=self._source("time"), dtype=torch.float64)

    def dropout_keys(self) -> tuple[int, ...]:
        return ()


class Polynomial(nn.Module):
    """Chebyshev polynomials of ln sigma: they learn at all times at once, which CT's long chain of targets needs."""

    def __init__(self, outputs: int, degree: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(degree + 1, outputs))

    def forward(self, log_sigma: Tensor) -> Tensor:
        low, high = math.log(RANGE["sigma_min"]), math.log(RANGE["sigma_max"])
        angle = ((log_sigma - low) / (high - low) * 2 - 1).clamp(-1, 1).acos()
        return torch.cos(angle * torch.arange(len(self.weight))) @ self.weight


def perceptron(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs))


class Network(nn.Module):
    """c_skip x + c_out F, where F is affine in x with learned functions of ln sigma as coefficients."""

    def __init__(self, build: Callable[[int], nn.Module], *, boundary: float) -> None:
        super().__init__()
        self.boundary = boundary
        self.coefficients = build(DIMENSION * (DIMENSION + 1))

    def forward(self, x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
        raw = self.coefficients(sigma[:, None].log()).view(-1, DIMENSION, DIMENSION + 1)
        sigma = sigma[:, None]
        scale = (sigma**2 + 0.25).sqrt()
        output = torch.einsum("bij,bj->bi", raw[..., :-1], x / scale) + raw[..., -1]
        elapsed = sigma - self.boundary
        return 0.25 / (elapsed**2 + 0.25) * x + 0.5 * elapsed / scale * output


@dataclass(frozen=True)
class Recipe:
    build: Callable[[int], nn.Module]
    steps: int
    batch: int
    rate: float


def train(method: Method, data: Gaussian, recipe: Recipe, *, teacher: Denoise | None = None) -> Network:
    """Minimises the method's loss with Adam and the method's schedules; returns an EMA of the student.

    Args:
        teacher: By default the exact denoiser of the data.
    """
    student = Network(recipe.build, boundary=0.0 if isinstance(method, EDM | TCM | MCD) else method.sigma_min)
    target, average = copy.deepcopy(student), copy.deepcopy(student)
    huber = isinstance(method, ICT | ECT | TCM)
    loss = build_loss(method, partial(pseudo_huber, c=0.03) if huber else l2)
    optimizer = torch.optim.Adam(student.parameters())
    for step in range(recipe.steps):
        values = schedules.for_method(method, step, learning_rate=0.0, total_steps=recipe.steps)
        networks = Networks(student, target if values.target_ema is not None else None, teacher or data.denoise)
        random = BatchRandomness(step, tuple(range(recipe.batch)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = recipe.rate * min(1.0, 2 * (1 - step / recipe.steps))
        optimizer.zero_grad()
        loss(networks, data.sample(recipe.batch, seed=step).float(), values, random).mean().backward()
        optimizer.step()
        follow(average, student, 0.997)
        follow(target, student, values.target_ema or 0.0)
    return average


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, rate: float) -> None:
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - rate)


@torch.no_grad()
def relative_error(network: Network, data: Gaussian, sigma: float) -> float:
    """Root mean square error of f(x + sigma z, sigma), relative to the standard deviation of the exact f."""
    source = torch.Generator().manual_seed(99)
    x = data.sample(4096, seed=98)
    x = x + sigma * torch.randn(x.shape, generator=source, dtype=torch.float64)
    times = torch.full((4096,), sigma)
    exact = data.consistency(x, times, sigma_min=network.boundary)
    error = (network(x.float(), times).double() - exact).square().mean()
    return math.sqrt(error / (exact - exact.mean(0)).square().mean())
