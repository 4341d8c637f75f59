"""Trains CD on a Gaussian mixture, where f is not linear, against a fine solution of the ODE."""

import copy
import itertools

import pytest
import torch
from small_training import RANGE, BatchRandomness, follow
from torch import Tensor, nn

from cmscale.config import CD
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.distance import l2
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import heun_step

MEANS, SPREAD = torch.tensor([-0.6, 0.5]), 0.15


def denoise(x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
    """E[x0 | x] of a mixture of two equally likely normals, per coordinate."""
    variance = SPREAD**2 + sigma.view(-1, 1, 1) ** 2
    means = MEANS.to(x)
    share = torch.softmax(-((x[..., None] - means) ** 2) / (2 * variance), dim=-1)
    each = means + SPREAD**2 / variance * (x[..., None] - means)
    return (share * each).sum(-1)


def draw(count: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return MEANS[torch.randint(2, (count, 1), generator=source)] + SPREAD * torch.randn(count, 1, generator=source)


def solved(x: Tensor, sigma: float, method: CD) -> Tensor:
    """The solution at sigma_min of the ODE from x at sigma, by 2000 Heun steps in float64."""
    start = method.model_copy(update={"sigma_max": sigma})
    x = x.double()
    for t, s in itertools.pairwise(grid.karras_grid(start, 2001).flip(0)):
        x = heun_step(denoise, x, t.expand(len(x)), s.expand(len(x)))
    return x


class Network(nn.Module):
    """c_skip x + c_out F(c_in x, ln sigma), F a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(2, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
        sigma = sigma[:, None]
        scale, elapsed = (sigma**2 + 0.25).sqrt(), sigma - RANGE["sigma_min"]
        output = self.layers(torch.cat([x / scale * 2, sigma.log() / 2], dim=1))
        return 0.25 / (elapsed**2 + 0.25) * x + 0.5 * elapsed / scale * output


@pytest.mark.slow
def test_cd_on_a_mixture_reaches_the_solved_trajectories_within_5_percent():
    method = CD(kind="cd", teacher="exact", distance="l2", num_scales=18, target_ema=0.5, **RANGE)
    student, steps = Network(), 3000
    target, average = copy.deepcopy(student), copy.deepcopy(student)
    loss, optimizer = build_loss(method, l2), torch.optim.Adam(student.parameters())
    values = ScheduleValues(0, 0.0, num_scales=18, target_ema=0.5)
    for step in range(steps):
        random = BatchRandomness(step, tuple(range(512)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss(Networks(student, target, denoise), draw(512, step), values, random).mean().backward()
        optimizer.step()
        follow(average, student, 0.99)
        follow(target, student, 0.5)
    for sigma in (0.05, 0.5, 2.0, 5.0, 10.0):
        x = draw(1024, 10**6) + sigma * torch.randn(1024, 1, generator=torch.Generator().manual_seed(3))
        exact = solved(x, sigma, method)
        with torch.no_grad():
            found = average(x, torch.full((1024,), sigma)).double()
        error = ((found - exact).square().mean() / exact.var()).sqrt()
        assert error < 0.05, (sigma, float(error))
