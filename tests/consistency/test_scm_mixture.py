"""sCD and sCT learn the consistency function of two modes in one dimension up to sigma 80, from a trained teacher.

An image holds 64 independent values with these two modes, and the network treats each value alone: 64 problems in one
dimension at one time. With a single value, dividing the tangent by its norm would leave its sign, which is another
method: of a random tangent, as in sCT, the sign's mean is zero at the median. The network's times pass the UNet's own
sinusoids. In one dimension the probability flow keeps the quantile of each point, so that f(x, sigma) is the quantile
function of the data at the quantile of x among data with noise.
"""

import copy
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from small_training import BatchRandomness, follow
from torch import Tensor, nn

from cmscale.config import EDM, SCD, SCT, Method, schedules
from cmscale.consistency.distance import l2
from cmscale.consistency.grid import ode_sigmas
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.consistency.sampler import heun
from cmscale.consistency.solver import Denoise
from cmscale.model import denoiser_for
from cmscale.model.blocks import timestep_embedding
from cmscale.model.precondition import teacher_denoiser_for
from cmscale.model.weighting import Weighting

MODE, SPREAD = 0.45, 0.22
SIDE, WIDTH, BATCH = 8, 64, 64
SIGMAS = (0.2, 0.5, 2.0, 10.0, 80.0)


def draw(count: int, seed: int) -> Tensor:
    """Images whose values are from N(-MODE, SPREAD^2) or N(MODE, SPREAD^2), [count, 1, SIDE, SIDE]; sd is 0.5."""
    source, shape = torch.Generator().manual_seed(seed), (count, 1, SIDE, SIDE)
    signs = torch.randint(2, shape, generator=source) * 2 - 1
    return MODE * signs + SPREAD * torch.randn(shape, generator=source)


def quantile(x: Tensor, sigma: float) -> Tensor:
    """The probability of values below x with noise of std sigma, float64."""
    spread = (SPREAD**2 + sigma**2) ** 0.5
    return (torch.special.ndtr((x + MODE) / spread) + torch.special.ndtr((x - MODE) / spread)) / 2


def exact(x: Tensor, sigma: float) -> Tensor:
    """f(x, sigma) of float64 values x, by interpolation in a table of quantiles."""
    values = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    table, wanted = quantile(values, 0.0), quantile(x, sigma)
    above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
    share = (wanted - table[above - 1]) / (table[above] - table[above - 1])
    return values[above - 1] + share * (values[above] - values[above - 1])


class Raw(nn.Module):
    """A perceptron with residual connections on each value, which gets the time by the UNet's embedding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.first, self.last = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.times = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.weighting = Weighting(SIDE * SIDE)
        self.weighting.initialise()

    def forward(self, x, c_noise, *, labels=None, dropout_keys=None, weight_time=None):
        embedding = self.embed(timestep_embedding(c_noise, 64))[:, None]
        h = self.first(2 * x.reshape(len(x), -1, 1))
        for layer, time in zip(self.hidden, self.times, strict=True):
            h = h + layer(nn.functional.silu(h + time(embedding)))
        out = self.last(nn.functional.silu(h)).reshape(x.shape)
        return out if weight_time is None else (out, self.weighting(weight_time))


def trained(method: Method, network: nn.Module, networks: Networks, *, steps: int, rate: float, seed: int) -> nn.Module:
    """Minimises the method's loss with a learning rate that falls to 0; returns an EMA of the weights."""
    loss, mean = build_loss(method, l2), copy.deepcopy(network)
    continuous = isinstance(method, SCD | SCT)
    kind = torch.optim.RAdam if continuous else torch.optim.Adam
    optimizer = kind(network.parameters(), betas=(0.9, 0.99 if continuous else 0.999))
    for step in range(steps):
        random = BatchRandomness(seed + step, tuple(range(BATCH)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(networks, draw(BATCH, seed + step), schedules.ScheduleValues(step, 0.0), random).mean().backward()
        optimizer.step()
        follow(mean, network, 0.99)
    return mean


@cache
def teacher_of(time_embedding: str, *, steps: int, seed: int) -> nn.Module:
    keys = {"time_embedding": time_embedding, "p_mean": -0.4, "p_std": 1.8}
    method, network = EDM(kind="edm", **keys), Raw(seed)  # pyright: ignore[reportArgumentType]
    networks = Networks(denoiser_for(method, network))
    return trained(method, network, networks, steps=steps, rate=3e-3, seed=10**7 * seed).requires_grad_(False)


def student_of(kind: str, teacher: nn.Module, time_embedding: str, *, steps: int, seed: int) -> Denoise:
    """The consistency function that a student of the teacher has learned."""
    keys = {"tangent_warmup_steps": steps // 6, "teacher": "t", "teacher_time_embedding": time_embedding}
    method = SCD(kind="scd", **keys) if kind == "scd" else SCT(kind="sct", start="teacher", **keys)
    network = copy.deepcopy(teacher).requires_grad_(True)
    networks = Networks(denoiser_for(method, network), None, teacher_denoiser_for(method, teacher))
    mean = trained(method, network, networks, steps=steps, rate=1e-3, seed=10**7 * seed + 10**6)
    return denoiser_for(method, mean)


def noisy(sigma: float) -> tuple[Tensor, Tensor]:
    """Data with noise, and the exact f of it."""
    noise = torch.randn(128, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    x = draw(128, seed=1) + sigma * noise
    return x, exact(x.flatten().double(), sigma)


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square error, relative to the standard deviation of what is expected."""
    return float((found.flatten().double() - expected).square().mean().sqrt() / expected.std())


@torch.no_grad()
def errors(f: Denoise) -> Mapping[float, float]:
    found = {}
    for sigma in SIGMAS:
        x, expected = noisy(sigma)
        found[sigma] = relative(f(x, torch.full((len(x),), sigma)), expected)
    return found


@torch.no_grad()
def ode_error(teacher: nn.Module, time_embedding: str) -> float:
    """The error of the teacher's samples by Heun's solver from sigma 80."""
    method = EDM(kind="edm", time_embedding=time_embedding)  # pyright: ignore[reportArgumentType]
    x, expected = noisy(80.0)
    return relative(heun(denoiser_for(method, teacher), x / 80, ode_sigmas(method, 60)), expected)


@pytest.mark.parametrize("kind", ["scd", "sct"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_f_is_learned_within_5_percent_up_to_80_from_a_teacher_that_is_told_the_angle(kind: str, seed: int):
    teacher = teacher_of("angle", steps=1000, seed=seed)
    assert ode_error(teacher, "angle") < 0.03
    assert errors(denoiser_for(SCT(kind="sct"), teacher))[80.0] > 0.9  # a denoiser, where the student starts
    found = errors(student_of(kind, teacher, "angle", steps=1000, seed=seed))
    assert max(found.values()) < 0.05, found
