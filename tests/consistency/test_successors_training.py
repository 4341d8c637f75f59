"""Trains small networks by sCT, sCD and progressive distillation on Gaussian data, against closed forms."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from gaussian import Gaussian
from small_training import BatchRandomness, follow, perceptron
from torch import Tensor, nn

from cmscale.config import PD, SCD, SCT, schedules
from cmscale.consistency import grid
from cmscale.consistency.distance import l2
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.consistency.sampler import euler, sample
from cmscale.model import TrigFlow, denoiser_for
from cmscale.model.weighting import Weighting

DIMENSION = 2
SD = 0.5


class Affine(nn.Module):
    """A raw network that is affine in x, with learned functions of c_noise as coefficients, and a weighting."""

    def __init__(self, log_tan: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.log_tan = log_tan
        self.coefficients = perceptron(DIMENSION * (DIMENSION + 1))
        self.weighting = Weighting(DIMENSION)
        self.weighting.initialise()

    def forward(self, x, c_noise, *, labels=None, dropout_keys=None, weight_time=None):
        raw = self.coefficients(self.log_tan(c_noise)[:, None] / 2).view(-1, DIMENSION, DIMENSION + 1)
        output = torch.einsum("bij,bj->bi", raw[..., :-1], x) + raw[..., -1]
        return output if weight_time is None else (output, self.weighting(weight_time))


class VectorFlow(TrigFlow):
    """TrigFlow on vectors in place of images."""

    def __call__(self, x: Tensor, sigma: Tensor, **keywords: object) -> Tensor:
        image = lambda v: v[:, :, None, None]  # noqa: E731

        def raw(x: Tensor, c_noise: Tensor, **more: object) -> Tensor:
            return image(self.raw(x[:, :, 0, 0], c_noise, **more))

        return TrigFlow(raw, self.sigma_data, self.time)(image(x), sigma)[:, :, 0, 0]


class Teacher:
    """The exact diffusion model of the data as a TrigFlow network."""

    def __init__(self, data: Gaussian) -> None:
        self.data = data

    def flow(self, x: Tensor, t: Tensor, *, dropout_keys: object = None) -> Tensor:
        x, t = x.double(), t.double()
        clean = self.data.denoise(SD * x / t.cos()[:, None], SD * t.tan())
        return ((t.cos()[:, None] * SD * x - clean) / (SD * t.sin()[:, None])).float()

    weighted_flow = flow_and_rate = flow  # unused: losses call only a teacher's flow


@pytest.mark.parametrize("kind", ["sct", "scd"])
@pytest.mark.long
def test_continuous_training_reaches_the_consistency_function_within_5_percent(kind: str):
    method = (
        SCT(kind="sct", tangent_warmup_steps=300)
        if kind == "sct"
        else SCD(kind="scd", teacher="t", tangent_warmup_steps=300)
    )
    log_tan = (lambda t: torch.log(torch.tan(t))) if kind == "sct" else (lambda c_noise: c_noise / 250 - math.log(SD))
    data, raw = Gaussian.random(DIMENSION, seed=0), Affine(log_tan)
    average = copy.deepcopy(raw)
    optimizer = torch.optim.Adam(raw.parameters())
    steps = 600
    time = denoiser_for(method, raw).time
    for step in range(steps):
        random = BatchRandomness(step, tuple(range(256)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        optimizer.zero_grad()
        networks = Networks(VectorFlow(raw, SD, time), None, Teacher(data))
        clean = data.sample(256, seed=step).float()
        build_loss(method, l2)(networks, clean, schedules.ScheduleValues(step, 0.0), random).mean().backward()
        optimizer.step()
        follow(average, raw, 0.98)
    x = data.sample(4096, seed=98)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    for sigma in (0.05, 0.5, 2.0, 5.0, 10.0):
        times = torch.full((4096,), sigma, dtype=torch.float64)
        exact = data.solve(x + sigma * noise, times, torch.zeros_like(times))
        with torch.no_grad():
            found = VectorFlow(average, SD, time)((x + sigma * noise).float(), times)
        error = (found.double() - exact).square().mean() / (exact - exact.mean(0)).square().mean()
        assert error.sqrt() < 0.05, (sigma, error.sqrt())


class Denoiser(nn.Module):
    """c_skip x + c_out F with F affine in x: EDM's preconditioning on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = perceptron(DIMENSION * (DIMENSION + 1))

    def forward(self, x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
        raw = self.coefficients(sigma[:, None].log()).view(-1, DIMENSION, DIMENSION + 1)
        sigma = sigma[:, None]
        scale = (sigma**2 + 0.25).sqrt()
        output = torch.einsum("bij,bj->bi", raw[..., :-1], x / scale) + raw[..., -1]
        return 0.25 / scale**2 * x + 0.5 * sigma / scale * output


@pytest.mark.long
def test_one_distilled_step_is_the_teachers_whole_euler_chain():
    """Four stages, N = 8 to 1: one step of the last student against 16 Euler steps of the exact denoiser."""
    method = PD(kind="pd", teacher="t", start_scales=8, sigma_min=0.02, sigma_max=10.0)
    data, student, steps = Gaussian.random(DIMENSION, seed=0), Denoiser(), 900
    loss = build_loss(method, l2)
    target: Callable[..., Tensor] = data.denoise
    optimizer = torch.optim.Adam(student.parameters())
    begun = 0
    for step in range(steps):
        values = schedules.for_method(method, step, learning_rate=0.0, total_steps=steps)
        length = steps // 6 * (1 if (values.num_scales or 0) > 2 else 2)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - (step - begun) / length)
        optimizer.zero_grad()
        random = BatchRandomness(step, tuple(range(256)), torch.device("cpu"))
        clean = data.sample(256, seed=step).float()
        loss(Networks(student, target), clean, values, random).mean().backward()
        optimizer.step()
        if values.target_ema == 0.0:
            target, begun = copy.deepcopy(student).requires_grad_(False), step + 1
            optimizer = torch.optim.Adam(student.parameters())
    assert values.num_scales == 1
    noise = torch.randn(4096, DIMENSION, generator=torch.Generator().manual_seed(1))
    chain = grid.karras_grid(method, 17).flip(0)
    landed = euler(data.denoise, noise.double(), chain)
    # PD's sample is the last estimate, which for the teacher's chain is x~
    top = 10.0 * noise.double()
    expected = top - 10.0 / (0.02 - 10.0) * (landed - top)
    found = sample(method, student, seed=0, indices=range(4096), shape=(DIMENSION,), noise=noise, clip=False).double()
    error = (found - expected).square().mean() / (expected - expected.mean(0)).square().mean()
    assert error.sqrt() < 0.05, error.sqrt()
