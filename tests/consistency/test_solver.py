import itertools
import math

import pytest
import torch
from gaussian import Gaussian

from cmscale.config import EDM
from cmscale.consistency import grid
from cmscale.consistency.solver import ESTIMATES, STEPS, euler_step, heun_step, toward


def integrate(name: str, data: Gaussian, steps: int) -> float:
    """The error at sigma = 0.02 after `steps` steps from sigma = 20, against the closed form."""
    times = grid.karras_grid(EDM(kind="edm", sigma_min=0.02, sigma_max=20.0), steps + 1).flip(0)
    start = data.sample(64, seed=1) + 20.0 * torch.randn(64, 6, generator=torch.Generator().manual_seed(2)).double()
    x = start
    for t, s in itertools.pairwise(times):
        x = STEPS[name](data.denoise, x, t.expand(64), s.expand(64))
    return (x - data.solve(start, times[0].expand(64), times[-1].expand(64))).abs().max().item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_solver_converges_with_its_order(name: str, order: int, seed: int):
    data = Gaussian.random(6, seed)
    errors = [integrate(name, data, steps) for steps in (200, 400, 800)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.1)


def test_euler_with_the_clean_sample_as_denoiser_is_the_pair_of_ct():
    source = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 3, 4, 4, generator=source, dtype=torch.float64)
    t, s = torch.full((5,), 3.0).double(), torch.full((5,), 2.0).double()
    given = euler_step(lambda x, sigma: clean, clean + 3.0 * noise, t, s)
    torch.testing.assert_close(given, clean + 2.0 * noise, rtol=1e-14, atol=1e-14)


def test_heun_averages_the_slopes_at_both_ends():
    seen: list[float] = []

    def denoise(x, sigma):
        seen.append(sigma[0].item())
        return torch.zeros_like(x) + sigma.view(-1, 1) ** 2

    x, t, s = torch.ones(1, 1).double(), torch.tensor([2.0]).double(), torch.tensor([1.0]).double()
    # slopes: (1 - 4)/2 = -1.5 at t; at s, x = 1 + 1.5 = 2.5: (2.5 - 1)/1 = 1.5; mean 0
    assert heun_step(denoise, x, t, s).item() == 1.0
    assert seen == [2.0, 1.0]


def test_each_sample_of_a_batch_steps_by_its_own_times():
    data = Gaussian.random(4, 3)
    x = data.sample(6, seed=4)
    t, s = torch.linspace(1, 3, 6).double(), torch.linspace(0.5, 0.9, 6).double()
    whole = heun_step(data.denoise, x, t, s)
    single = torch.cat([heun_step(data.denoise, x[i : i + 1], t[i : i + 1], s[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(whole, single, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("ratio", [0.2, 0.9, 0.99999])
def test_a_straight_line_to_a_steps_estimate_ends_where_the_step_does(name: str, ratio: float):
    data = Gaussian.random(6, 0)
    t = torch.tensor([0.01, 0.5, 4.0, 80.0], dtype=torch.float64)
    x = data.sample(4, seed=1) + t[:, None] * torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    found = toward(ESTIMATES[name](data.denoise, x, t, ratio * t), x, t, ratio * t)
    torch.testing.assert_close(found, STEPS[name](data.denoise, x, t, ratio * t), rtol=1e-12, atol=1e-13)
