import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmscale.config import CD, CT, ECT, EDM, ICT, MCD, TCM
from cmscale.config.methods import SCT
from cmscale.consistency import grid
from cmscale.consistency.sampler import default_sigmas
from cmscale.errors import UserError
from cmscale.rng import SampleRandomness

DIFFUSION = EDM(kind="edm")


@given(st.integers(2, 1500), st.floats(1e-3, 0.1), st.floats(1.0, 200.0), st.floats(1.0, 12.0))
def test_grid_is_increasing_and_its_ends_are_exact(num_scales: int, low: float, high: float, rho: float):
    times = grid.karras_grid(EDM(kind="edm", sigma_min=low, sigma_max=high, rho=rho), num_scales)
    assert times.dtype == torch.float64
    assert (times[0].item(), times[-1].item()) == (low, high)
    assert (times.diff() > 0).all()


def test_grid_is_the_papers_formula():
    times = grid.karras_grid(DIFFUSION, 40)
    for i in range(1, 41):
        root = 0.002 ** (1 / 7) + (i - 1) / 39 * (80 ** (1 / 7) - 0.002 ** (1 / 7))
        assert times[i - 1].item() == pytest.approx(root**7, rel=1e-13)


@pytest.mark.parametrize(
    ("method", "sigma"),
    [
        (CD(kind="cd", teacher="t"), 4.366),
        (CD(kind="cd", teacher="t", distance="l2"), 3.520),
        (CT(kind="ct"), 3.991),
        (ECT(kind="ect", teacher="t"), 0.821),
        (TCM(kind="tcm", teacher="t"), 1.526),
        (TCM(kind="tcm", teacher="t", sigma_min=2.0), 2.0),
    ],
)
def test_two_step_sampling_takes_the_authors_times(method, sigma: float):
    times = grid.consistency_sigmas(method, 2)
    assert times[0].item() == 80.0
    assert times[1].item() == pytest.approx(sigma, abs=5e-4)


def test_cat_ct_index_gives_the_authors_time():
    assert grid.indexed_sigmas(DIFFUSION, (62,), last=150).item() == pytest.approx(5.249, abs=5e-4)


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_segments_are_sampled_from_their_ends_in_the_training_grid_and_in_no_other_number_of_steps(segments: int):
    method = MCD(kind="mcd", teacher="t", segments=segments)  # pyright: ignore[reportArgumentType]
    times = default_sigmas(method)
    starts = grid.karras_grid(method, 65)[:: 64 // segments]
    assert times.flip(0).tolist() == pytest.approx(starts[1:].tolist(), rel=1e-14)
    with pytest.raises(UserError, match=rf"--steps: got 3, but the model was trained to be sampled in {segments}"):
        grid.consistency_sigmas(method, 3)


@pytest.mark.parametrize("steps", [1, 3, 4, 17])
def test_sampling_times_are_even_on_the_curve(steps: int):
    times = grid.consistency_sigmas(ICT(kind="ict"), steps)
    assert len(times) == steps
    torch.testing.assert_close(times, grid.karras_grid(DIFFUSION, steps + 1).flip(0)[:-1], rtol=1e-13, atol=0)


def test_ode_sigmas_run_from_sigma_max_to_sigma_min_to_zero():
    sigmas = grid.ode_sigmas(EDM(kind="edm"), 40)
    assert len(sigmas) == 41
    assert sigmas[[0, -2, -1]].tolist() == [80.0, 0.002, 0.0]


@given(st.integers(2, 1281), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=50))
def test_index_stays_on_the_grid_and_neighbours_are_its_times(num_scales: int, drawn: list[float]):
    uniform = torch.tensor(drawn, dtype=torch.float64)
    index = grid.uniform_index(uniform, num_scales)
    assert (index >= 1).all()
    assert (index <= num_scales - 1).all()
    lower, upper = grid.neighbours(DIFFUSION, index, num_scales)
    times = grid.karras_grid(DIFFUSION, num_scales)
    assert torch.equal(lower, times[index - 1])
    assert torch.equal(upper, times[index])


def test_uniform_index_reaches_every_pair_equally():
    uniform = (torch.arange(3900, dtype=torch.float64) + 0.5) / 3900
    assert torch.bincount(grid.uniform_index(uniform, 40)).tolist() == [0] + [100] * 39


def test_lognormal_index_has_icts_distribution():
    times = grid.karras_grid(DIFFUSION, 21)
    edges = [math.erf((math.log(t) + 1.1) / (math.sqrt(2) * 2.0)) for t in times.tolist()]
    weights = torch.tensor([b - a for a, b in itertools.pairwise(edges)], dtype=torch.float64)
    count = 200_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    index = grid.lognormal_index(uniform, times, p_mean=-1.1, p_std=2.0)
    found = torch.bincount(index, minlength=21)[1:].double() / count
    # evenly spaced uniforms miss the probability of each cell by at most one spacing
    torch.testing.assert_close(found, weights / weights.sum(), rtol=0, atol=1.01 / count)


@pytest.mark.parametrize("freedom", [1.0, 3.0, 50.0])
def test_truncated_students_times_have_the_quantiles_of_their_distribution(freedom: float):
    from scipy.stats import t as student

    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)
    range_ = {"p_mean": 0.3, "p_std": 0.8, "degrees_of_freedom": freedom, "low": 1.0, "high": 80.0}
    times = grid.truncated_student_time(uniform, **range_)
    low, high = (student.cdf((math.log(end) - 0.3) / 0.8, freedom) for end in (1.0, 80.0))
    expected = torch.from_numpy(student.ppf(low + uniform.numpy() * (high - low), freedom) * 0.8 + 0.3).exp()
    torch.testing.assert_close(times[:-1], expected[:-1], rtol=1e-5, atol=0)
    assert (times[0].item(), times[-1].item()) == (1.0, pytest.approx(80.0, rel=1e-12))


def test_lognormal_time_has_the_quantiles_of_its_distribution():
    normal = torch.distributions.Normal(torch.tensor(-1.2, dtype=torch.float64), 1.2)
    uniform = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
    time = grid.lognormal_time(uniform, p_mean=-1.2, p_std=1.2)
    torch.testing.assert_close(normal.cdf(time.log()), uniform, rtol=1e-12, atol=0)
    assert 0 < grid.lognormal_time(torch.zeros(1, dtype=torch.float64), p_mean=-1.2, p_std=1.2).item() < 1e-4


def test_off_grid_times_lie_on_no_grid_that_training_visits():
    off_grid = grid.off_grid_times(DIFFUSION, 100)
    assert len(off_grid) == 100
    assert (off_grid.diff() > 0).all()
    for num_scales in range(2, 1282):
        times = grid.karras_grid(DIFFUSION, num_scales)
        place = torch.searchsorted(times, off_grid).clamp(1, num_scales - 1)
        gap = torch.minimum((off_grid - times[place]).abs(), (off_grid - times[place - 1]).abs())
        assert (gap > 1e-9 * off_grid).all()


def test_times_drawn_depend_on_the_samples_place_alone():
    whole = SampleRandomness(7, tuple(range(8)), torch.device("cpu")).uniform()
    part = SampleRandomness(7, (5, 2), torch.device("cpu")).uniform()
    assert torch.equal(grid.uniform_index(whole, 40)[[5, 2]], grid.uniform_index(part, 40))


def test_one_step_of_an_ode_sampler_leads_from_sigma_max_to_zero():
    assert grid.ode_sigmas(EDM(kind="edm"), 1).tolist() == [80.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "second", "changed"),
    [
        (ECT, 0.821, {"sigma_max": 0.5}),
        (ECT, 0.821, {"sigma_max": 0.821}),
        (ECT, 0.821, {"sigma_min": 1.0}),
        (SCT, 0.982, {"sigma_max": 0.9}),
    ],
)
def test_a_published_second_time_outside_the_models_range_is_refused(kind, second: float, changed: dict):
    method = kind.model_validate({"kind": kind.__name__.lower(), "teacher": "t", **changed})
    with pytest.raises(
        UserError, match=rf"the second time that was published .*, {second:.3g}.* give --sampling-times"
    ):
        grid.consistency_sigmas(method, 2)
    assert len(grid.consistency_sigmas(method, 1)) == 1
