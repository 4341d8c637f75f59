"""Compares the samplers with closed forms, and with their algorithms in float64 numpy."""

import itertools

import numpy as np
import pytest
import torch
from gaussian import Gaussian

from cmscale.config import CT, EDM, PD
from cmscale.consistency import grid, sampler
from cmscale.rng import normal_like_samples

SHAPE = (3, 4, 4)


class Counted:
    """A smooth denoiser that numpy can compute too; it records the times of its calls."""

    def __init__(self) -> None:
        self.sigmas: list[float] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **keywords: object) -> torch.Tensor:
        self.sigmas += [sigma[0].item()]
        assert keywords.get("dropout_keys") is None
        return torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1))) * 0.7


def numpy_denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    return np.tanh(x / (1 + sigma)) * 0.7


def noises(seed: int, number: int) -> list[np.ndarray]:
    """The start noise and the noise of each step for samples 0..2, as numpy."""
    purposes = ["start"] + [f"step-{step}" for step in range(1, number + 1)]
    return [normal_like_samples(seed, range(3), SHAPE, purpose=purpose).double().numpy() for purpose in purposes]


def draw(method, steps: int, *, seed: int, name: sampler.Sampler = "heun", **keywords) -> np.ndarray:
    given = sampler.sample(
        method, Counted(), seed=seed, indices=range(3), steps=steps, shape=SHAPE, sampler=name, **keywords
    )
    assert given.dtype == torch.float32
    return given.double().numpy()


def karras(index: int, last: int) -> float:
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return (high + index / last * (low - high)) ** 7


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_multistep_is_algorithm_1(steps: int, seed: int):
    times = {1: [80.0], 2: [80.0, karras(67, 150)]}.get(steps, [karras(i, steps) for i in range(steps)])
    z = noises(seed, steps)
    x = numpy_denoise(times[0] * z[0], times[0])
    for number, tau in enumerate(times[1:], start=1):
        x = numpy_denoise(x + np.sqrt(tau**2 - 0.002**2) * z[number], tau)
    np.testing.assert_allclose(draw(CT(kind="ct"), steps, seed=seed), x, rtol=1e-5, atol=1e-6)


def numpy_ode(name: str, steps: int, z: list[np.ndarray]) -> np.ndarray:
    """Heun, Euler, DPM-2 and ancestral sampling of an EDM model, as in their papers."""
    sigmas = [karras(i, steps - 1) for i in range(steps)] + [0.0]
    x = sigmas[0] * z[0]
    for number, (t, s) in enumerate(itertools.pairwise(sigmas), start=1):
        slope = (x - numpy_denoise(x, t)) / t
        if name == "heun" and s > 0:
            ahead = x + (s - t) * slope
            x = x + (s - t) * (slope + (ahead - numpy_denoise(ahead, s)) / s) / 2
        elif name == "dpm2":
            middle = ((t ** (1 / 3) + s ** (1 / 3)) / 2) ** 3
            halfway = x + (middle - t) * slope
            x = x + (s - t) * (halfway - numpy_denoise(halfway, middle)) / middle
        elif name == "ancestral":
            up = np.sqrt(s**2 * (t**2 - s**2) / t**2)
            x = x + (np.sqrt(s**2 - up**2) - t) * slope + up * z[number]
        else:
            x = x + (s - t) * slope
    return x


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["heun", "euler", "dpm2", "ancestral"])
def test_edm_samplers_are_their_algorithms(name, seed: int):
    expected = numpy_ode(name, 18, noises(seed, 18))
    given = draw(EDM(kind="edm"), 18, seed=seed, name=name)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("method", "steps", "name"),
    [(EDM(kind="edm"), 40, name) for name in ("heun", "euler", "dpm2", "ancestral")]
    + [(CT(kind="ct"), steps, "heun") for steps in (1, 2, 7)]
    + [(PD(kind="pd", teacher="t"), steps, "heun") for steps in (1, 4)],
)
def test_number_of_evaluations(method, steps: int, name):
    denoise = Counted()
    sampler.sample(method, denoise, seed=0, indices=[0], steps=steps, shape=SHAPE, sampler=name)
    assert len(denoise.sigmas) == sampler.num_evaluations(method, steps, name)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_pd_takes_eulers_steps_on_its_stages_grid_and_gives_the_last_estimate(steps: int):
    """On the student's training grid, N intervals of the Karras curve; with N = 1 the sample is D(T z, T)."""
    (noise,) = noises(0, 0)
    times = [*(karras(index, steps) for index in range(steps)), 0.0]
    x = 80 * noise
    for t, s in itertools.pairwise(times):
        x = x + (s - t) * (x - numpy_denoise(x, t)) / t
    # a float32 step from 80 to 0 subtracts values in the hundreds, which have a spacing of 1.5e-5
    np.testing.assert_allclose(draw(PD(kind="pd", teacher="t"), steps, seed=0), x, rtol=1e-5, atol=4e-5)


def test_forty_heun_steps_are_79_evaluations():
    assert sampler.num_evaluations(EDM(kind="edm"), 40) == 79


@pytest.mark.parametrize(
    ("method", "name"), [(CT(kind="ct"), "heun"), (EDM(kind="edm"), "ancestral"), (EDM(kind="edm"), "heun")]
)
def test_a_sample_depends_on_its_seed_and_number_alone(method, name):
    def run(indices: list[int], seed: int = 5) -> torch.Tensor:
        keywords = {"seed": seed, "indices": indices, "steps": 4, "shape": SHAPE, "sampler": name}
        return sampler.sample(method, Counted(), **keywords)

    whole = run(list(range(6)))
    torch.testing.assert_close(torch.cat([run([0]), run([1, 2, 3]), run([4, 5])]), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run([4, 1]), whole[[4, 1]], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(run([0], seed=6), whole[:1], atol=1e-2)


def test_given_noise_replaces_the_start_alone():
    noise = normal_like_samples(9, range(3), SHAPE, purpose="start")
    with_noise = sampler.sample(CT(kind="ct"), Counted(), seed=9, indices=range(3), steps=3, shape=SHAPE, noise=noise)
    drawn = sampler.sample(CT(kind="ct"), Counted(), seed=9, indices=range(3), steps=3, shape=SHAPE)
    assert torch.equal(with_noise, drawn)


def test_clipping_holds_every_estimate_in_range():
    seen: list[float] = []

    def denoise(x, sigma, **keywords):
        seen.append(x.abs().max().item())
        return 5 * torch.ones_like(x)

    keywords = {
        "seed": 0,
        "indices": [0],
        "shape": SHAPE,
        "sigmas": torch.tensor([80.0, 0.002], dtype=torch.float64),
    }
    assert (sampler.sample(CT(kind="ct"), denoise, **keywords) == 1).all()
    assert seen[1] == 1  # at the boundary no noise is added to the first estimate
    assert (sampler.sample(CT(kind="ct"), denoise, clip=False, **keywords) == 5).all()


def test_heun_samples_of_a_gaussian_follow_the_closed_form():
    data, source = Gaussian.random(6, 0), torch.Generator().manual_seed(1)
    noise = torch.randn(100, 6, generator=source, dtype=torch.float64)
    times = grid.karras_grid(EDM(kind="edm"), 200).flip(0)
    sigmas = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    given = sampler.heun(data.denoise, noise, sigmas)
    exact = data.solve(80 * noise, times[0].expand(100), torch.zeros(100, dtype=torch.float64))
    torch.testing.assert_close(given, exact, rtol=0, atol=1e-3)


def test_multistep_samples_of_an_exact_consistency_function_have_the_datas_moments():
    data, count = Gaussian.random(4, 2), 200_000
    source = torch.Generator().manual_seed(3)

    def fresh(number: int) -> torch.Tensor:
        return torch.randn(count, 4, generator=source, dtype=torch.float64)

    sigmas = torch.tensor([80.0, 3.0, 0.7], dtype=torch.float64)
    given = sampler.multistep(data.consistency, fresh(0), sigmas, draw=fresh, sigma_min=0.002)
    covariance = data.axes * (data.variances + 0.002**2) @ data.axes.T
    # T = 80 is finite: samples start without the data's mean, of which sqrt(S) / 80 < 1 % is lost
    torch.testing.assert_close(torch.cov(given.T), covariance, rtol=0, atol=6 * 0.41 * (2 / count) ** 0.5)
    torch.testing.assert_close(given.mean(0), data.mean, rtol=0, atol=6 * (0.41 / count) ** 0.5 + 1e-5)


def test_ancestral_samples_of_a_gaussian_have_its_moments():
    data, count = Gaussian.random(3, 4), 50_000
    source = torch.Generator().manual_seed(3)

    def fresh(number: int) -> torch.Tensor:
        return torch.randn(count, 3, generator=source, dtype=torch.float64)

    given = sampler.ancestral(data.denoise, fresh(0), grid.ode_sigmas(EDM(kind="edm"), 200), draw=fresh)
    covariance = data.axes * data.variances @ data.axes.T
    torch.testing.assert_close(torch.cov(given.T), covariance, rtol=0, atol=0.02)
    torch.testing.assert_close(given.mean(0), data.mean, rtol=0, atol=0.02)
