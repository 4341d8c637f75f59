"""Compares every loss with its formula in float64 numpy, on the same images, noise and indices."""

import itertools
import math

import numpy as np
import pytest
import torch

from cmscale.config import CD, CT, ECT, EDM, ICT, MCD, PD, TCM
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency.distance import build_distance
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.rng import SampleRandomness

SIZE = 4
RANDOM = [SampleRandomness(seed, tuple(range(3 * seed, 3 * seed + 8)), torch.device("cpu")) for seed in range(12)]


class Affine(torch.nn.Module):
    """A denoiser that numpy can compute too; it records the dropout keys of each call."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.matrix = torch.nn.Parameter(torch.randn(3, 3, generator=source) * 0.5)
        self.calls: list[object] = []

    def forward(self, x, sigma, *, dropout_keys=None):
        self.calls.append(dropout_keys)
        gain = (1 / (1 + sigma)).view(-1, 1, 1, 1)
        return torch.einsum("cd,bdhw->bchw", self.matrix, x) * gain + torch.sin(x)

    def in_numpy(self, x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        matrix = self.matrix.detach().double().numpy()
        return np.einsum("cd,bdhw->bchw", matrix, x) / (1 + sigma[:, None, None, None]) + np.sin(x)


def images(seed: int) -> torch.Tensor:
    return torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def numpy_distance(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = (a - b).reshape(len(a), -1)
    match kind:
        case "l1":
            return np.abs(difference).mean(1)
        case "l2":
            return (difference**2).mean(1)
        case _:
            c = 0.00054 * math.sqrt(difference.shape[1])
            return np.sqrt((difference**2).sum(1) + c**2) - c


def karras(n: np.ndarray, scales: int) -> np.ndarray:
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (low + (n - 1) / (scales - 1) * (high - low)) ** 7


def at(time: np.ndarray) -> np.ndarray:
    return time[:, None, None, None]


def setting(random: SampleRandomness):
    clean = images(random.seed)
    uniform = random.uniform().numpy()
    return clean, uniform, clean.double().numpy(), random.noise(clean.shape[1:]).double().numpy()


def loss_of(
    method, networks: Networks, clean: torch.Tensor, values: ScheduleValues, random: SampleRandomness
) -> torch.Tensor:
    loss = build_loss(method, build_distance(method, SIZE))(networks, clean, values, random)
    assert loss.dtype == torch.float32
    assert loss.shape == (8,)
    return loss


def assert_close(given: torch.Tensor, expected: np.ndarray) -> None:
    """Equal to float32 rounding."""
    np.testing.assert_allclose(given.detach().double().numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("random", RANDOM)
def test_edm_loss(random: SampleRandomness):
    method, network = EDM(kind="edm"), Affine(1)
    clean, uniform, x, z = setting(random)
    from scipy.stats import norm

    sigma = np.exp(-1.2 + 1.2 * norm.ppf(uniform))
    denoised = network.in_numpy(x + at(sigma) * z, sigma)
    expected = (1 / sigma**2 + 1 / 0.5**2) * ((denoised - x) ** 2).reshape(8, -1).mean(1)
    assert_close(loss_of(method, Networks(network), clean, ScheduleValues(0, 1.0), random), expected)


@pytest.mark.parametrize("random", RANDOM)
@pytest.mark.parametrize("distance", ["l1", "l2", "pseudo_huber"])
@pytest.mark.parametrize("weighting", ["uniform", "inverse_gap"])
def test_ct_loss(weighting: str, distance: str, random: SampleRandomness):
    method, student, target = CT(kind="ct", distance=distance, weighting=weighting), Affine(1), Affine(2)
    clean, uniform, x, z = setting(random)
    n = 1 + np.floor(uniform * 33)
    lower, upper = karras(n, 34), karras(n + 1, 34)
    aim = target.in_numpy(x + at(lower) * z, lower)
    expected = numpy_distance(distance, student.in_numpy(x + at(upper) * z, upper), aim)
    if weighting == "inverse_gap":
        expected /= upper - lower
    values = ScheduleValues(0, 1.0, num_scales=34, target_ema=0.9)
    assert_close(loss_of(method, Networks(student, target), clean, values, random), expected)


@pytest.mark.parametrize("random", RANDOM)
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("distance", ["l1", "l2", "pseudo_huber"])
def test_cd_loss(distance: str, solver: str, random: SampleRandomness):
    method = CD(kind="cd", teacher="t", distance=distance, solver=solver)
    student, target, teacher = Affine(1), Affine(2), Affine(3)
    clean, uniform, x, z = setting(random)
    n = 1 + np.floor(uniform * 39)
    lower, upper = karras(n, 40), karras(n + 1, 40)
    noisy = x + at(upper) * z
    slope = (noisy - teacher.in_numpy(noisy, upper)) / at(upper)
    if solver == "heun":
        ahead = noisy + at(lower - upper) * slope
        slope = (slope + (ahead - teacher.in_numpy(ahead, lower)) / at(lower)) / 2
    expected = numpy_distance(
        distance,
        student.in_numpy(noisy, upper),
        target.in_numpy(noisy + at(lower - upper) * slope, lower),
    )
    values = ScheduleValues(0, 1.0, num_scales=40, target_ema=0.95)
    given = loss_of(method, Networks(student, target, teacher), clean, values, random)
    assert_close(given, expected)
    assert teacher.calls == [None] * (2 if solver == "heun" else 1)  # no dropout in the teacher


@pytest.mark.parametrize("random", RANDOM)
@pytest.mark.parametrize("weighting", ["truncated_snr", "uniform"])
@pytest.mark.parametrize("scales", [1, 8])
def test_pd_loss(scales: int, weighting: str, random: SampleRandomness):
    method, student, teacher = PD(kind="pd", teacher="t", weighting=weighting), Affine(1), Affine(3)
    clean, uniform, x, z = setting(random)
    n = 1 + np.floor(uniform * scales)  # the interval from grid time n + 1 down to n of N + 1 times
    upper, middle, lower = (karras(place, 2 * scales + 1) for place in (2 * n + 1, 2 * n, 2 * n - 1))
    noisy = x + at(upper) * z
    halfway = noisy + at((middle - upper) / upper) * (noisy - teacher.in_numpy(noisy, upper))
    landed = halfway + at((lower - middle) / middle) * (halfway - teacher.in_numpy(halfway, middle))
    # one Euler step from noisy with the estimate D ends at `landed`: D = noisy - t (landed - noisy) / (s - t)
    aim = noisy - at(upper) * (landed - noisy) / at(lower - upper)
    weight = np.maximum(1 / upper**2, 1) if weighting == "truncated_snr" else 1.0
    expected = weight * numpy_distance("l2", student.in_numpy(noisy, upper), aim)
    given = loss_of(
        method, Networks(student, teacher), clean, ScheduleValues(0, 1.0, num_scales=scales, target_ema=1.0), random
    )
    # at small times the division by s - t magnifies the float32 rounding of the difference of two close images
    np.testing.assert_allclose(given.detach().numpy(), expected, rtol=1e-3, atol=1e-6)
    assert teacher.calls == [None, None]  # no dropout in the teacher
    assert student.calls == [random.dropout_keys()]


@pytest.mark.parametrize("random", RANDOM)
def test_ict_loss(random: SampleRandomness):
    method, network = ICT(kind="ict"), Affine(1)
    clean, uniform, x, z = setting(random)
    edges = np.array([math.erf((math.log(t) + 1.1) / (math.sqrt(2) * 2)) for t in karras(np.arange(1, 22), 21)])
    n = 1 + np.searchsorted((edges[1:] - edges[0]) / (edges[-1] - edges[0]), uniform, side="right")
    lower, upper = karras(n, 21), karras(n + 1, 21)
    estimate = network.in_numpy(x + at(upper) * z, upper)
    aim = network.in_numpy(x + at(lower) * z, lower)
    expected = numpy_distance("pseudo_huber", estimate, aim) / (upper - lower)
    values = ScheduleValues(0, 1.0, num_scales=21)
    assert_close(loss_of(method, Networks(network), clean, values, random), expected)


@pytest.mark.parametrize("random", RANDOM)
@pytest.mark.parametrize("stage", [0, 3, 7])
def test_ect_loss(stage: int, random: SampleRandomness):
    method, network = ECT(kind="ect", teacher="t"), Affine(1)
    clean, uniform, x, z = setting(random)
    from scipy.stats import norm

    t = np.exp(-1.1 + 2.0 * norm.ppf(uniform))
    r = np.maximum(t * (1 - 2.0 ** -(stage + 1) * (1 + 8 / (1 + np.exp(t)))), 0)
    aim = np.where(at(r) > 0, network.in_numpy(x + at(r) * z, r), x)
    expected = numpy_distance("pseudo_huber", network.in_numpy(x + at(t) * z, t), aim) / (t - r)
    # in late stages x + t z and x + r z are close, so that their float32 rounding weighs more
    given = loss_of(method, Networks(network), clean, ScheduleValues(0, 1.0, stage=stage), random)
    np.testing.assert_allclose(given.detach().numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("random", RANDOM[:4])
@pytest.mark.parametrize(("q", "c"), [(4.0, 0.06), (4.0, 0.0)])
def test_ect_loss_as_on_imagenet_64(q: float, c: float, random: SampleRandomness):
    """(sqrt(||.||^2 + c^2) - c) (1 / t^2 + 1 / sd^2), in the first stage, where r = 0 for small t."""
    method = ECT(kind="ect", teacher="t", weighting="edm", p_mean=-0.8, p_std=1.6, q=q, huber_c=c)
    network = Affine(1)
    clean, uniform, x, z = setting(random)
    from scipy.stats import norm

    t = np.exp(-0.8 + 1.6 * norm.ppf(uniform))
    r = np.maximum(t * (1 - (1 + 8 / (1 + np.exp(t))) / q), 0)
    aim = np.where(at(r) > 0, network.in_numpy(x + at(r) * z, r), x)
    square = ((network.in_numpy(x + at(t) * z, t) - aim) ** 2).reshape(8, -1).sum(1)
    expected = (np.sqrt(square + c**2) - c) * (1 / t**2 + 1 / 0.5**2)
    given = loss_of(method, Networks(network), clean, ScheduleValues(0, 1.0, stage=0), random)
    np.testing.assert_allclose(given.detach().numpy(), expected, rtol=1e-4)


def test_ect_begins_as_diffusion_and_narrows_the_gap():
    from cmscale.consistency.losses.ect import ect_lower_time

    t = torch.logspace(-3, 1, 50, dtype=torch.float64)
    gaps = [t - ect_lower_time(t, stage=stage, q=2.0, k=8.0, b=1.0) for stage in range(8)]
    assert torch.equal(gaps[0][t < 1], t[t < 1])  # r = 0: the diffusion loss
    assert all((b <= a).all() for a, b in itertools.pairwise(gaps))
    assert (gaps[-1] > 0).all()


@pytest.mark.parametrize("random", RANDOM)
@pytest.mark.parametrize(("weighting", "c"), [("edm", 0.06), ("inverse_gap", 0.0)])
def test_tcm_loss(weighting: str, c: float, random: SampleRandomness):
    """Of the samples at t' the target is the first stage's, with the weight of their share; of the others by r."""
    method = TCM(kind="tcm", teacher="t", weighting=weighting, gap=0.05, huber_c=c)  # pyright: ignore
    student, first = Affine(1), Affine(3)
    clean, uniform, x, z = setting(random)
    logs = np.linspace(0, np.log(80), 2_000_001)
    density = (1 + (logs / 0.2) ** 2 / 0.01) ** -0.505
    quantiles = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2))
    at_boundary = uniform < 0.25
    t = np.exp(np.interp((uniform - 0.25) / 0.75 * quantiles[-1], quantiles, logs))
    t = np.where(at_boundary, 1.0, t)
    r = t * (1 - 0.05 * (1 + 8 / (1 + np.exp(t))))
    aim = np.where(at(r) < 1, first.in_numpy(x + at(r) * z, r), student.in_numpy(x + at(r) * z, r))
    square = ((student.in_numpy(x + at(t) * z, t) - aim) ** 2).reshape(8, -1).sum(1)
    expected = (np.sqrt(square + c**2) - c) * np.where(at_boundary, 0.1 / 0.25, 1 / 0.75)
    expected *= 1 / t**2 + 1 / 0.5**2 if weighting == "edm" else 1 / (t - r)
    given = loss_of(method, Networks(student, None, first), clean, ScheduleValues(0, 1.0), random)
    np.testing.assert_allclose(given.detach().numpy(), expected, rtol=2e-4)


def segment_aim(
    student: Affine, teacher: Affine, noisy: np.ndarray, *, times: np.ndarray, solver: str, clean: np.ndarray
) -> np.ndarray:
    """The inverse DDIM step from t to the end of the two jumps, as the paper has it; times are t, s and u [B]."""
    upper, lower, start = times
    slope = (noisy - teacher.in_numpy(noisy, upper)) / at(upper)
    if solver == "heun":
        ahead = noisy + at(lower - upper) * slope
        slope = (slope + (ahead - teacher.in_numpy(ahead, lower)) / at(lower)) / 2
    less_noisy = noisy + at(lower - upper) * slope
    if solver == "addim":  # algorithm 3 with alpha = 1, sigma = t, and eta = 0.75
        mean = teacher.in_numpy(noisy, upper)
        count = mean[0].size
        x_var = 0.75 * ((clean - mean) ** 2).reshape(len(mean), -1).sum(1) / count
        z_var = (1 - lower / upper) ** 2 * x_var
        noise = (noisy - mean) / at(upper)
        norm = (noise**2).reshape(len(mean), -1).sum(1)
        less_noisy = mean + at(np.sqrt(lower**2 + count / norm * z_var)) * noise
    own = student.in_numpy(less_noisy, lower)
    end = own + at(start / lower) * (less_noisy - own)
    return (end - at(start / upper) * noisy) / at(1 - start / upper)


def segment_times(uniform: np.ndarray, scales: int, segments: int) -> np.ndarray:
    n = 1 + np.floor(uniform * (scales - 1))
    length = (scales - 1) // segments
    return np.stack([karras(n + 1, scales), karras(n, scales), karras(1 + (n - 1) // length * length, scales)])


@pytest.mark.parametrize("random", RANDOM)
@pytest.mark.parametrize(("segments", "scales"), [(1, 41), (4, 41), (8, 9)])
@pytest.mark.parametrize("solver", ["addim", "euler", "heun"])
def test_mcd_loss(solver: str, segments: int, scales: int, random: SampleRandomness):
    """With 8 segments of one step each the student's estimate does not matter: the target is the teacher's step."""
    method = MCD(kind="mcd", teacher="t", segments=segments, solver=solver, distance="l2")  # pyright: ignore
    student, teacher = Affine(1), Affine(3)
    clean, uniform, x, z = setting(random)
    times = segment_times(uniform, scales, segments)
    noisy = x + at(times[0]) * z
    aim = segment_aim(student, teacher, noisy, times=times, solver=solver, clean=x)
    expected = (1 / times[0] ** 2 + 1 / 0.5**2) * numpy_distance("l2", student.in_numpy(noisy, times[0]), aim)
    given = loss_of(method, Networks(student, None, teacher), clean, ScheduleValues(0, 1.0, num_scales=scales), random)
    np.testing.assert_allclose(given.detach().numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("distance", ["l1", "l2", "pseudo_huber"])
def test_mcd_gradient_is_the_formulas(distance: str):
    """Against central differences of the float64 formula in each of the network's numbers."""
    keys = {"solver": "euler", "distance": distance, "huber_c": None, "weighting": "uniform"}
    method = MCD(kind="mcd", teacher="t", segments=2, **keys)  # pyright: ignore[reportArgumentType]
    student, teacher = Affine(1), Affine(3)
    clean, uniform, x, z = setting(RANDOM[3])
    loss_of(
        method, Networks(student, None, teacher), clean, ScheduleValues(0, 1.0, num_scales=41), RANDOM[3]
    ).mean().backward()
    times = segment_times(uniform, 41, 2)
    noisy = x + at(times[0]) * z
    aim = segment_aim(student, teacher, noisy, times=times, solver="euler", clean=x)

    def value(matrix: np.ndarray) -> float:
        estimate = np.einsum("cd,bdhw->bchw", matrix, noisy) / (1 + at(times[0])) + np.sin(noisy)
        return numpy_distance(distance, estimate, aim).mean()

    assert_gradient(student, value)


METHODS = [
    (MCD(kind="mcd", teacher="t"), ScheduleValues(0, 1.0, num_scales=41)),
    (TCM(kind="tcm", teacher="t"), ScheduleValues(0, 1.0)),
    (CT(kind="ct", distance="l2"), ScheduleValues(0, 1.0, num_scales=20, target_ema=0.9)),
    (CD(kind="cd", teacher="t", distance="l2"), ScheduleValues(0, 1.0, num_scales=20, target_ema=0.9)),
    (ICT(kind="ict"), ScheduleValues(0, 1.0, num_scales=21)),
    (ECT(kind="ect", teacher="t"), ScheduleValues(0, 1.0, stage=5)),
]


@pytest.mark.parametrize(("method", "values"), METHODS)
def test_only_the_student_is_differentiated(method, values: ScheduleValues):
    student, target, teacher = Affine(1), Affine(2), Affine(3)
    loss_of(method, Networks(student, target, teacher), images(0), values, RANDOM[0]).mean().backward()
    assert student.matrix.grad is not None
    assert target.matrix.grad is None
    assert teacher.matrix.grad is None


@pytest.mark.parametrize(("method", "values"), METHODS)
def test_without_a_target_the_student_is_its_own_without_gradient(method, values: ScheduleValues):
    student, teacher = Affine(1), Affine(3)
    twin = Affine(1)
    networks = Networks(student, None, teacher), Networks(twin, Affine(1), teacher)
    alone, with_twin = (loss_of(method, each, images(0), values, RANDOM[0]).mean() for each in networks)
    alone.backward()
    with_twin.backward()
    assert torch.equal(alone, with_twin)
    assert torch.equal(student.matrix.grad, twin.matrix.grad)


@pytest.mark.parametrize(("method", "values"), METHODS)
def test_student_and_target_share_their_dropout_keys(method, values: ScheduleValues):
    student, target = Affine(1), Affine(2)
    loss_of(method, Networks(student, target, Affine(3)), images(0), values, RANDOM[0])
    assert student.calls == target.calls == [RANDOM[0].dropout_keys()]


@pytest.mark.parametrize(("method", "values"), METHODS)
def test_a_samples_loss_does_not_depend_on_its_batch(method, values: ScheduleValues):
    networks = Networks(Affine(1), Affine(2), Affine(3))
    loss = build_loss(method, build_distance(method, SIZE))
    whole = loss(networks, images(0), values, RANDOM[0])
    parts = [loss(networks, images(0)[2 * i : 2 * i + 2], values, part) for i, part in enumerate(RANDOM[0].split(2))]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("distance", ["l1", "l2", "pseudo_huber"])
def test_cd_gradient_is_the_formulas(distance: str, solver: str):
    """Against central differences of the float64 formula in each of the network's numbers."""
    method = CD(kind="cd", teacher="t", distance=distance, solver=solver)
    student, target, teacher = Affine(1), Affine(2), Affine(3)
    clean, uniform, x, z = setting(RANDOM[3])
    values = ScheduleValues(0, 1.0, num_scales=40, target_ema=0.95)
    loss_of(method, Networks(student, target, teacher), clean, values, RANDOM[3]).mean().backward()
    n = 1 + np.floor(uniform * 39)
    lower, upper = karras(n, 40), karras(n + 1, 40)
    noisy = x + at(upper) * z
    slope = (noisy - teacher.in_numpy(noisy, upper)) / at(upper)
    if solver == "heun":
        ahead = noisy + at(lower - upper) * slope
        slope = (slope + (ahead - teacher.in_numpy(ahead, lower)) / at(lower)) / 2
    aim = target.in_numpy(noisy + at(lower - upper) * slope, lower)

    def value(matrix: np.ndarray) -> float:
        estimate = np.einsum("cd,bdhw->bchw", matrix, noisy) / (1 + at(upper)) + np.sin(noisy)
        return numpy_distance(distance, estimate, aim).mean()

    assert_gradient(student, value)


def assert_gradient(student: Affine, value) -> None:
    matrix = student.matrix.detach().double().numpy()
    for place in np.ndindex(3, 3):
        nudge = np.zeros((3, 3))
        nudge[place] = 1e-6
        slope = (value(matrix + nudge) - value(matrix - nudge)) / 2e-6
        assert student.matrix.grad is not None
        assert student.matrix.grad[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("distance", ["l1", "l2", "pseudo_huber"])
def test_ct_gradient_is_the_formulas(distance: str):
    """Against central differences of the float64 formula in each of the network's numbers."""
    method, student, target = CT(kind="ct", distance=distance), Affine(1), Affine(2)
    clean, uniform, x, z = setting(RANDOM[3])
    values = ScheduleValues(0, 1.0, num_scales=34, target_ema=0.9)
    loss_of(method, Networks(student, target), clean, values, RANDOM[3]).mean().backward()
    n = 1 + np.floor(uniform * 33)
    lower, upper = karras(n, 34), karras(n + 1, 34)
    aim = target.in_numpy(x + at(lower) * z, lower)

    def value(matrix: np.ndarray) -> float:
        noisy = x + at(upper) * z
        estimate = np.einsum("cd,bdhw->bchw", matrix, noisy) / (1 + at(upper)) + np.sin(noisy)
        return numpy_distance(distance, estimate, aim).mean()

    assert_gradient(student, value)
