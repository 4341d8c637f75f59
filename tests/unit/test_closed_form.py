"""Small networks trained by each method reach the consistency function of Gaussian data, a closed form."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from gaussian import Gaussian
from torch import Tensor, nn

from cmscale import schedules
from cmscale.config import CD, CT, ECT, EDM, ICT, Method
from cmscale.consistency.distance import l2, pseudo_huber
from cmscale.consistency.loss import Networks, build_loss
from cmscale.rng import SampleRandomness

DIMENSION = 2
RANGE = {"sigma_min": 0.02, "sigma_max": 10.0}


@dataclass(frozen=True)
class BatchRandomness(SampleRandomness):
    """Draws a whole batch from one generator: thousands of keyed generators would take the test's time."""

    def _source(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + len(purpose))

    def noise(self, shape, purpose: str = "noise") -> Tensor:
        return torch.randn(len(self.positions), *shape, generator=self._source(purpose))

    def uniform(self, purpose: str = "time") -> Tensor:
        return torch.rand(len(self.positions), generator=self._source(purpose), dtype=torch.float64)

    def dropout_keys(self) -> tuple[int, ...]:
        return ()


class Polynomial(nn.Module):
    """Chebyshev polynomials of ln sigma: learns everywhere at once, as CT's long chain of targets needs."""

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
    """c_skip x + c_out F with F affine in x, its coefficients a learned function of ln sigma."""

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


def train(method: Method, data: Gaussian, recipe: Recipe) -> Network:
    """Adam on the method's loss, with the method's own schedules; gives the average of the last weights."""
    student = Network(recipe.build, boundary=0.0 if isinstance(method, EDM) else method.sigma_min)
    target, average = copy.deepcopy(student), copy.deepcopy(student)
    huber = isinstance(method, (ICT, ECT))
    loss = build_loss(method, partial(pseudo_huber, c=0.03) if huber else l2)
    optimizer = torch.optim.Adam(student.parameters())
    for step in range(recipe.steps):
        point = schedules.of_method(method, schedules.Point(step, 0.0), total_steps=recipe.steps)
        networks = Networks(student, target if point.target_ema is not None else None, data.denoise)
        random = BatchRandomness(step, tuple(range(recipe.batch)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = recipe.rate * min(1.0, 2 * (1 - step / recipe.steps))
        optimizer.zero_grad()
        loss(networks, data.sample(recipe.batch, seed=step).float(), point, random).mean().backward()
        optimizer.step()
        follow(average, student, 0.997)
        follow(target, student, point.target_ema or 0.0)
    return average


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, rate: float) -> None:
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - rate)


@torch.no_grad()
def relative_error(network: Network, data: Gaussian, sigma: float) -> float:
    """Root mean square error of f(x + sigma z, sigma), over the spread of what it should give."""
    source = torch.Generator().manual_seed(99)
    x = data.sample(4096, seed=98)
    x = x + sigma * torch.randn(x.shape, generator=source, dtype=torch.float64)
    times = torch.full((4096,), sigma)
    exact = data.consistency(x, times, sigma_min=network.boundary)
    error = (network(x.float(), times).double() - exact).square().mean()
    return math.sqrt(error / (exact - exact.mean(0)).square().mean())


CASES = [
    pytest.param(
        CD(kind="cd", teacher="exact", distance="l2", num_scales=18, target_ema=0.5, **RANGE),
        Recipe(perceptron, steps=1500, batch=256, rate=3e-3),
        id="cd",
    ),
    pytest.param(
        CT(kind="ct", distance="l2", s0=4, s1=100, mu0=0.3, **RANGE),
        Recipe(Polynomial, steps=2000, batch=1024, rate=0.02),
        id="ct",
    ),
    pytest.param(
        ICT(kind="ict", p_mean=0.0, p_std=1.5, s1=320, **RANGE),
        Recipe(perceptron, steps=2500, batch=1024, rate=3e-3),
        id="ict",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ECT(kind="ect", teacher="none", p_mean=0.0, p_std=1.5, num_stages=7, **RANGE),
        Recipe(perceptron, steps=2500, batch=1024, rate=3e-3),
        id="ect",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("method", "recipe"), CASES)
def test_training_reaches_the_consistency_function_within_5_percent(method: Method, recipe: Recipe):
    data = Gaussian.random(DIMENSION, seed=0)
    network = train(method, data, recipe)
    errors = {sigma: relative_error(network, data, sigma) for sigma in (0.05, 0.5, 2.0, 5.0, 10.0)}
    assert max(errors.values()) < 0.05, errors


def test_edm_training_reaches_the_denoiser_of_the_data():
    data = Gaussian.random(DIMENSION, seed=0)
    network = train(EDM(kind="edm", **RANGE), data, Recipe(perceptron, steps=1500, batch=256, rate=3e-3))
    noise = torch.randn(4096, DIMENSION, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for sigma in (0.1, 0.5, 2.0):
        x = data.sample(4096, seed=1) + sigma * noise
        times = torch.full((4096,), sigma)
        with torch.no_grad():
            error = (network(x.float(), times) - data.denoise(x, times)).square().mean().sqrt()
        assert error < 0.05 * data.variances.sqrt().mean()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dimension", [1, 3, 8])
def test_the_closed_form_solves_the_probability_flow(dimension: int, seed: int):
    """dx/dt of `solve` is (x - D(x, t)) / t: the reference of this file stands on its own derivation."""
    data = Gaussian.random(dimension, seed)
    x, t = data.sample(16, seed=1) * 3, torch.linspace(0.1, 5, 16, dtype=torch.float64)
    step = 1e-5 * t
    slope = (data.solve(x, t, t + step) - data.solve(x, t, t - step)) / (2 * step)[:, None]
    torch.testing.assert_close(slope, (x - data.denoise(x, t)) / t[:, None], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_the_exact_consistency_function_has_the_boundary_and_is_constant_along_trajectories(seed: int):
    data = Gaussian.random(5, seed)
    x, eps = data.sample(16, seed=1), torch.full((16,), 0.002, dtype=torch.float64)
    torch.testing.assert_close(data.consistency(x, eps), x, rtol=1e-12, atol=1e-12)
    t, s = torch.full((16,), 7.0).double(), torch.full((16,), 0.4).double()
    along = data.consistency(data.solve(x, t, s), s)
    torch.testing.assert_close(along, data.consistency(x, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_consistency_function_has_no_loss(seed: int):
    """CD's loss of the true f with the true teacher is what one fine Heun step gets wrong: almost 0."""
    data = Gaussian.random(DIMENSION, seed)
    method = CD(kind="cd", teacher="exact", distance="l2", num_scales=400)
    networks = Networks(data.consistency, data.consistency, data.denoise)
    random = SampleRandomness(seed, tuple(range(64)), torch.device("cpu"))
    point = schedules.Point(0, 1.0, num_scales=400, target_ema=0.9)
    loss = build_loss(method, l2)(networks, data.sample(64, seed), point, random)
    assert loss.max() < 1e-9
