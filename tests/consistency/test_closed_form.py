"""Trains small networks by each method on Gaussian data, against the closed-form consistency function."""

import pytest
import torch
from gaussian import Gaussian
from small_training import DIMENSION, RANGE, Polynomial, Recipe, perceptron, relative_error, train

from cmscale.config import CD, CT, ECT, EDM, ICT, TCM, Method, schedules
from cmscale.consistency.distance import l2
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.rng import SampleRandomness

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
@pytest.mark.long
def test_training_reaches_the_consistency_function_within_5_percent(method: Method, recipe: Recipe):
    data = Gaussian.random(DIMENSION, seed=0)
    network = train(method, data, recipe)
    errors = {sigma: relative_error(network, data, sigma) for sigma in (0.05, 0.5, 2.0, 5.0, 10.0)}
    assert max(errors.values()) < 0.05, errors


@pytest.mark.slow
def test_truncated_training_reaches_the_consistency_function_to_80_from_an_exact_first_stage():
    data, method = Gaussian.random(DIMENSION, seed=0), TCM(kind="tcm", teacher="exact", gap=0.02, huber_c=0.03)

    def first_stage(x: torch.Tensor, sigma: torch.Tensor, **keywords: object) -> torch.Tensor:
        return data.consistency(x.double(), sigma.double(), sigma_min=0.0).float()

    network = train(method, data, Recipe(perceptron, steps=2000, batch=512, rate=3e-3), teacher=first_stage)
    errors = {sigma: relative_error(network, data, sigma) for sigma in (1.0, 2.0, 10.0, 80.0)}
    assert max(errors.values()) < 0.05, errors


@pytest.mark.long
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
    """dx/dt of `solve` is (x - D(x, t)) / t, which checks this file's reference independently."""
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
    """CD's loss of the exact f with the exact teacher is the error of one fine Heun step: almost 0."""
    data = Gaussian.random(DIMENSION, seed)
    method = CD(kind="cd", teacher="exact", distance="l2", num_scales=400)
    networks = Networks(data.consistency, data.consistency, data.denoise)
    random = SampleRandomness(seed, tuple(range(64)), torch.device("cpu"))
    values = schedules.ScheduleValues(0, 1.0, num_scales=400, target_ema=0.9)
    loss = build_loss(method, l2)(networks, data.sample(64, seed), values, random)
    assert loss.max() < 1e-9
