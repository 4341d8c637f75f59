"""sCD and sCT learn the consistency function of two modes in one dimension up to sigma 80, from a trained teacher.

The network's times pass the UNet's own sinusoids. In one dimension the probability flow keeps the quantile of each
point, so that f(x, sigma) is the quantile function of the data at the quantile of x among data with noise.
"""

import copy

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

MODE, SPREAD, WIDTH = 0.45, 0.22, 128


def draw(count: int, seed: int) -> Tensor:
    """Pictures of one value from N(-MODE, SPREAD^2) or N(MODE, SPREAD^2), [count, 1, 1, 1]; sd is 0.5."""
    source = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count,), generator=source) * 2 - 1
    return (MODE * signs + SPREAD * torch.randn(count, generator=source)).reshape(count, 1, 1, 1)


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
    """A perceptron with residual connections, which gets the time by the UNet's embedding, and a weighting."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.first, self.last = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.times = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.weighting = Weighting(1)
        self.weighting.initialise()

    def forward(self, x, c_noise, *, labels=None, dropout_keys=None, weight_time=None):
        embedding, h = self.embed(timestep_embedding(c_noise, 64)), self.first(2 * x.reshape(-1, 1))
        for layer, time in zip(self.hidden, self.times, strict=True):
            h = h + layer(nn.functional.silu(h + time(embedding)))
        out = self.last(nn.functional.silu(h)).reshape(x.shape)
        return out if weight_time is None else (out, self.weighting(weight_time))


def trained(
    method: Method, network: nn.Module, networks: Networks, *, steps: int, batch: int, rate: float
) -> nn.Module:
    """Minimises the method's loss with a learning rate that falls to 0; returns an EMA of the weights."""
    loss, mean = build_loss(method, l2), copy.deepcopy(network)
    continuous = isinstance(method, SCD | SCT)
    kind = torch.optim.RAdam if continuous else torch.optim.Adam
    optimizer = kind(network.parameters(), betas=(0.9, 0.99 if continuous else 0.999))
    for step in range(steps):
        seed = step + 100_000 * continuous
        random = BatchRandomness(seed, tuple(range(batch)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(networks, draw(batch, seed), schedules.ScheduleValues(step, 0.0), random).mean().backward()
        optimizer.step()
        follow(mean, network, 0.99)
    return mean


def teacher_of(time_embedding: str, *, steps: int, batch: int) -> nn.Module:
    keys = {"time_embedding": time_embedding, "p_mean": -0.4, "p_std": 1.8}
    method, network = EDM(kind="edm", **keys), Raw()
    networks = Networks(denoiser_for(method, network))
    return trained(method, network, networks, steps=steps, batch=batch, rate=3e-3).requires_grad_(False)


def student_of(
    kind: str, teacher: nn.Module, time_embedding: str, *, steps: int, batch: int, rate: float, tangent: str = "auto"
) -> Denoise:
    """The consistency function that a student of the teacher has learned."""
    keys = {"p_mean": 0.0, "p_std": 1.9, "tangent_warmup_steps": steps // 6, "tangent": tangent}
    keys |= {"teacher": "t", "teacher_time_embedding": time_embedding}
    method = SCD(kind="scd", **keys) if kind == "scd" else SCT(kind="sct", start="teacher", **keys)
    network = copy.deepcopy(teacher).requires_grad_(True)
    networks = Networks(denoiser_for(method, network), None, teacher_denoiser_for(method, teacher))
    return denoiser_for(method, trained(method, network, networks, steps=steps, batch=batch, rate=rate))


@torch.no_grad()
def error(f: Denoise, sigma: float) -> float:
    """Root mean square error of f(x + sigma z, sigma), relative to the standard deviation of the exact f."""
    noise = torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    x = draw(4096, seed=1) + sigma * noise
    expected = exact(x.flatten().double(), sigma)
    found = f(x, torch.full((4096,), sigma)).flatten().double()
    return float((found - expected).square().mean().sqrt() / expected.std())


@torch.no_grad()
def ode_error(teacher: nn.Module, time_embedding: str) -> float:
    """The same of the teacher's samples by Heun's solver from sigma 80."""
    method = EDM(kind="edm", time_embedding=time_embedding)  # pyright: ignore[reportArgumentType]
    noise = torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    expected = exact(80.0 * noise.flatten().double(), 80.0)
    found = heun(denoiser_for(method, teacher), noise, ode_sigmas(method, 60)).flatten().double()
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_f_at_80_is_learned_within_10_percent_from_a_teacher_that_is_told_the_angle():
    teacher = teacher_of("angle", steps=2000, batch=512)
    assert ode_error(teacher, "angle") < 0.03
    f = student_of("scd", teacher, "angle", steps=2000, batch=512, rate=1e-3)
    found = {sigma: error(f, sigma) for sigma in (0.5, 2.0, 10.0, 80.0)}
    assert max(found.values()) < 0.1, found
