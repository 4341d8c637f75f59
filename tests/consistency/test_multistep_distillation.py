"""Multistep consistency distillation on Gaussian data, whose segments have closed forms, up to sigma 80."""

import copy
import itertools

import pytest
import torch
import two_modes
from gaussian import Gaussian
from small_training import DIMENSION, BatchRandomness, Recipe, follow, train
from torch import Tensor, nn

from cmscale.config import MCD, schedules
from cmscale.consistency import grid
from cmscale.consistency.distance import l2
from cmscale.consistency.grid import ode_sigmas
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.consistency.sampler import heun, sample
from cmscale.model import denoiser_for
from cmscale.model.blocks import timestep_embedding
from cmscale.rng import SampleRandomness


def method_of(segments: int, **keys: object) -> MCD:
    return MCD(kind="mcd", teacher="exact", segments=segments, **keys)  # pyright: ignore[reportArgumentType]


class ExactJump:
    """The estimate towards which a straight line from x at t meets the trajectory at the start of its segment."""

    def __init__(self, data: Gaussian, method: MCD) -> None:
        self.data, self.ends = data, grid.karras_grid(method, method.segments + 1)

    def start(self, t: Tensor) -> Tensor:
        """The lower end of the segment of times t; a time at which two meet belongs to the lower one."""
        inside = t * (1 - 1e-6)
        return self.ends[(torch.searchsorted(self.ends, inside.double()) - 1).clamp(min=0)]

    def __call__(self, x: Tensor, t: Tensor, *, dropout_keys: object = None) -> Tensor:
        t = t.double()
        start = self.start(t)
        ratio = torch.where(start < t, start / t, 0.0)[:, None]  # no jump begins at sigma_min
        landed = self.data.solve(x.double(), t, start)
        return ((landed - ratio * x) / (1 - ratio)).to(x)


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_the_exact_jump_has_no_loss_with_fine_steps_of_the_exact_teacher(segments: int):
    data, method = Gaussian.random(DIMENSION, seed=0), method_of(segments, solver="heun", weighting="uniform")
    random = SampleRandomness(segments, tuple(range(256)), torch.device("cpu"))
    values = schedules.for_method(method, 10**6, learning_rate=1.0, total_steps=1)

    def largest(student) -> float:
        networks = Networks(student, None, data.denoise)
        return build_loss(method, l2)(networks, data.sample(256, segments), values, random).max().item()

    assert largest(ExactJump(data, method)) < 1e-11
    other = method_of(2 * segments)
    assert largest(ExactJump(data, other)) > 1e-7  # of other segments


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_as_many_sampling_steps_as_segments_end_where_the_trajectory_does(segments: int):
    data, method = Gaussian.random(4, seed=1), method_of(segments)
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    common = {"seed": 0, "indices": range(64), "shape": (4,), "noise": noise, "clip": False}
    found = sample(method, ExactJump(data, method), **common)
    at = [
        torch.full((64,), time, dtype=torch.float64)
        for time in (80.0, float(grid.karras_grid(method, segments + 1)[1]))
    ]
    before_last = data.solve(80.0 * noise, at[0], at[1])
    torch.testing.assert_close(found, ExactJump(data, method)(before_last, at[1]), rtol=1e-9, atol=1e-9)
    clean = data.solve(80.0 * noise, at[0], torch.zeros(64))
    extrapolated = method.sigma_min * noise.norm(dim=1)  # the last step goes on from sigma_min to 0
    assert ((found - clean).norm(dim=1) < 1.01 * extrapolated).all()


class Embedded(nn.Module):
    """A perceptron of the UNet's time embedding, which can tell the segments on both sides of a time apart."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = itertools.pairwise((64, 64, 64))
        hidden = [layer for width in widths for layer in (nn.Linear(*width), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, outputs))

    def forward(self, log_sigma: Tensor) -> Tensor:
        return self.layers(timestep_embedding(250 * log_sigma[:, 0], 64))


@pytest.mark.parametrize("segments", [4, *(pytest.param(other, marks=pytest.mark.slow) for other in (1, 2, 8))])
@pytest.mark.long
def test_training_reaches_the_jumps_within_5_percent_up_to_80(segments: int):
    """Relative to the standard deviation of the data; samples, too, where the errors of all steps add up."""
    data = Gaussian.random(DIMENSION, seed=0)
    method = method_of(segments, solver="heun", teacher_steps=32, final_teacher_steps=64, annealing_steps=700)
    network = train(method, data, Recipe(Embedded, steps=1500, batch=256, rate=6e-3))
    exact, noise = ExactJump(data, method), torch.randn(4096, DIMENSION, generator=torch.Generator().manual_seed(1))

    def error(found: Tensor, expected: Tensor) -> float:
        return ((found - expected).square().mean() / data.variances.mean()).sqrt().item()

    errors = {}
    for sigma in grid.karras_grid(method, 65)[8::8].tolist():  # with all ends of segments, where jumps are longest
        times = torch.full((4096,), sigma)
        x = data.sample(4096, seed=98) + sigma * noise
        with torch.no_grad():
            errors[sigma] = error(network(x.float(), times), exact(x, times))
    drawn = sample(method, network, seed=0, indices=range(4096), shape=(DIMENSION,), noise=noise, clip=False)
    errors["samples"] = error(drawn, data.solve(80.0 * noise, torch.full((4096,), 80.0), torch.zeros(4096)))
    assert max(errors.values()) < 0.05, errors


def test_the_trajectories_of_two_modes_are_those_of_their_denoiser():
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solved = heun(two_modes.denoise, noise, ode_sigmas(method_of(1), 400)).flatten()
    start = 80.0 * noise.flatten()
    torch.testing.assert_close(two_modes.exact(start, 80.0), solved, rtol=0, atol=1e-4)
    halfway = two_modes.exact(start, 80.0, to=5.0)
    torch.testing.assert_close(two_modes.exact(halfway, 5.0), two_modes.exact(start, 80.0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_samples_of_two_modes_end_where_the_trajectory_does(segments: int):
    """Within 10 % of the standard deviation of the data, with EDM's preconditioning as in a run."""
    method = method_of(segments, solver="heun", teacher_steps=32, final_teacher_steps=64, annealing_steps=1000)
    network, steps = two_modes.Raw(seed=0), 2500
    student, mean = denoiser_for(method, network), copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(steps):
        values = schedules.for_method(method, step, learning_rate=0.0, total_steps=steps)
        random = BatchRandomness(step, tuple(range(64)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        networks = Networks(student, None, two_modes.denoise)
        build_loss(method, l2)(networks, two_modes.draw(64, step), values, random).mean().backward()
        optimizer.step()
        follow(mean, network, 0.99)
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    common = {"seed": 0, "indices": range(64), "shape": (1, 8, 8), "noise": noise, "clip": False}
    with torch.no_grad():
        found = sample(method, denoiser_for(method, mean), **common)
    expected = two_modes.exact(80.0 * noise.flatten().double(), 80.0)
    assert two_modes.relative(found, expected) < 0.1
