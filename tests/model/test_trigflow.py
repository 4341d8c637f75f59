"""Tests of TrigFlow and the sCM losses, against EDM, finite differences and closed forms."""

import math

import numpy as np
import pytest
import torch
from gaussian import Gaussian
from networks import random_weights, relative, small_model
from torch.autograd import forward_ad

from cmscale.config import SCD, SCT
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency.distance import l2
from cmscale.consistency.grid import consistency_sigmas
from cmscale.consistency.losses import build_loss
from cmscale.consistency.losses.continuous import Flow, tangent
from cmscale.consistency.losses.sct import SCTLoss
from cmscale.consistency.networks import Networks
from cmscale.consistency.sampler import sample
from cmscale.model import EDMDenoiser, TrigFlow, UNet, denoiser_for
from cmscale.model.attention import attend, reference_attention
from cmscale.model.weighting import WeightedUNet, Weighting, build_weighted_unet, without_weighting
from cmscale.rng import SampleRandomness

SD = 0.5


def angles(count: int) -> torch.Tensor:
    return torch.linspace(0.02, 1.55, count, dtype=torch.float64)


def column(t: torch.Tensor) -> torch.Tensor:
    return t[:, None]


class Smooth(torch.nn.Module):
    """A raw network on vectors or images, smooth in both arguments, in the precision of its input."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.weighting = Weighting(48)
        self.weighting.initialise()
        self.keys: list[object] = []

    def forward(self, x, c_noise, *, labels=None, dropout_keys=None, weight_time=None):
        self.keys.append(dropout_keys)
        time = (c_noise / 20).reshape(-1, *[1] * (x.ndim - 1))
        out = self.scale.to(x) * torch.sin(2 * x + time) + 0.3 * x.roll(1, dims=1) * torch.cos(time)
        return out if weight_time is None else (out, self.weighting(weight_time))


class ExactFlow:
    """F of the exact consistency function of a Gaussian, f(x_t, t) = m + sqrt(S / (S + sigma^2)) (x_sigma - m)."""

    def __init__(self, data: Gaussian) -> None:
        self.data = data

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        noisy = SD * x / column(t.cos())
        f = self.data.solve(noisy, SD * t.tan(), torch.zeros_like(t))
        return (SD * column(t.cos()) * x - f) / (SD * column(t.sin()))

    def rate(self, x: torch.Tensor, t: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """cos(t) sin(t) dF/dt along the slope, by forward differentiation of the formula above."""
        _, rate = torch.func.jvp(self.__call__, (x, t), (slope / SD, torch.ones_like(t)))
        return column(t.cos() * t.sin()) * rate


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dimension", [1, 2, 6])
def test_the_true_consistency_function_has_no_tangent(dimension: int, seed: int):
    """Tests all signs of g at once: along the exact ODE, df/dt = 0 in float64."""
    data, t = Gaussian.random(dimension, seed), angles(16)
    noise = torch.randn(16, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = column(t.cos()) * data.sample(16, seed) + column(t.sin()) * SD * noise
    clean = data.denoise(x / column(t.cos()), SD * t.tan())
    slope = (column(t.cos()) * x - clean) / column(t.sin())  # sd F of the diffusion model
    exact = ExactFlow(data)
    g = tangent(exact(x / SD, t), exact.rate(x / SD, t, slope), x, slope, t, sigma_data=SD, ratio=1.0)
    assert g.abs().max() < 1e-10
    wrong = tangent(-exact(x / SD, t), exact.rate(x / SD, t, slope), x, slope, t, sigma_data=SD, ratio=1.0)
    assert wrong.abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_trigflows_ode_is_the_probability_flow(seed: int):
    """dx_t/dt = sd F with F from the denoiser is the derivative of cos(t) times the closed form's trajectory."""
    data, t = Gaussian.random(3, seed), angles(12)
    start = data.sample(12, seed) * 2

    def trajectory(at: torch.Tensor) -> torch.Tensor:
        return column(at.cos()) * data.solve(start, torch.full_like(at, 0.3), SD * at.tan())

    step = 1e-6
    found = (trajectory(t + step) - trajectory(t - step)) / (2 * step)
    x = trajectory(t)
    expected = (column(t.cos()) * x - data.denoise(x / column(t.cos()), SD * t.tan())) / column(t.sin())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("time", ["angle", "log_sigma"])
@pytest.mark.parametrize("seed", range(5))
def test_the_tangent_of_any_network_is_cos_times_df_dt(time, seed: int):
    """Compares with central differences of f along a line x_t, in float64."""
    flow, t = TrigFlow(Smooth(), sigma_data=SD, time=time), torch.linspace(0.2, 1.4, 8, dtype=torch.float64)
    x, slope = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def f(distance: float) -> torch.Tensor:
        at, moved = t + distance, x + distance * slope
        return column(at.cos()) * moved - column(at.sin()) * SD * flow.flow(moved / SD, at).detach()

    value, rate = flow.flow_and_rate(x / SD, t, slope)
    assert torch.equal(value, flow.flow(x / SD, t).detach())
    g = tangent(value, rate, x, slope, t, sigma_data=SD, ratio=1.0)
    torch.testing.assert_close(g, column(t.cos()) * (f(1e-6) - f(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", ["as LSUN 256", "as ImageNet 64", "sampling by convolution"])
@pytest.mark.parametrize("time", ["angle", "log_sigma"])
def test_the_real_network_is_differentiated_forward(variant: str, time):
    """Compares attention, normalisation, resampling and dropout of the UNet with central differences in float64."""
    model = small_model(variant, num_classes=None, dropout=0.2, image_size=16)
    network = UNet(model)
    network.load_state_dict(random_weights(model))
    network.double().requires_grad_(False)
    keys = (1, 2)
    with pytest.MonkeyPatch.context() as patch:  # without the network's roundings to float32
        patch.setattr(torch.Tensor, "float", lambda self: self.double())
        flow = TrigFlow(network, sigma_data=SD, time=time)
        t = torch.tensor([0.4, 1.2], dtype=torch.float64)
        x, slope = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        value, rate = flow.flow_and_rate(x, t, slope, dropout_keys=keys)
        factor = (t.cos() * t.sin())[:, None, None, None]
        step = 1e-6
        ahead, behind = (flow.flow(x + s * slope / SD, t + s, dropout_keys=keys) for s in (step, -step))
        assert relative(rate, factor * (ahead - behind) / (2 * step)) < 2e-5
        assert relative(value, flow.flow(x, t, dropout_keys=keys)) < 1e-12


@pytest.mark.parametrize("differences", ["central_differences", "backward_differences"])
def test_a_point_derivative_in_time_is_ripple_where_the_embedding_is_fast_and_right_where_it_is_slow(differences):
    """The UNet with its own embedding, to sigma 80: dF/d ln(sigma) with x at rest, at a point and by differences."""
    model = small_model()
    network = UNet(model).requires_grad_(False)
    network.load_state_dict(random_weights(model))
    sigma = torch.tensor([0.05, 0.5, 2.0, 10.0, 80.0]).repeat(2)
    t, x = torch.atan(sigma / SD), torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def size(time, derivative) -> torch.Tensor:
        flow = TrigFlow(network, sigma_data=SD, time=time, derivative=derivative)
        _, rate = flow.flow_and_rate(x, t, torch.zeros_like(x))
        return rate.flatten(1).norm(dim=1)

    slow, fast = (size(time, "jvp") / size(time, differences) for time in ("angle", "log_sigma"))
    assert (slow - 1).abs().max() < 0.05, slow
    assert fast.min() > 3, fast


class Ripple(torch.nn.Module):
    """A raw network of time alone: -(cos, sin)(k ln sigma), so that F is (cos, sin)."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, x, c_noise, *, labels=None, dropout_keys=None):
        phase = self.k * c_noise / 250
        return -torch.stack([phase.cos(), phase.sin()], dim=1)[..., None, None].expand_as(x)


@pytest.mark.parametrize("k", [0.5, 5.0, 20.0, 40.0, 125.0, 250.0])
def test_backward_differences_damp_a_ripple_that_central_ones_let_stand(k: float):
    """<F, dF/du> of F = (cos, sin)(k u): (1 - cos(k h))^2 / h, h = 0.1, and 0; the derivative's is 0."""
    t, x = angles(16), torch.zeros(16, 2, 1, 1, dtype=torch.float64)

    def growth(derivative) -> torch.Tensor:
        flow = TrigFlow(Ripple(k), sigma_data=SD, time="log_sigma", derivative=derivative)
        value, rate = flow.flow_and_rate(x, t, torch.zeros_like(x))
        return (value * rate).flatten(1).sum(1)

    expected = torch.full((16,), (1 - math.cos(0.1 * k)) ** 2 / 0.1, dtype=torch.float64)
    torch.testing.assert_close(growth("backward_differences"), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(growth("central_differences"), torch.zeros_like(expected), rtol=0, atol=1e-9)


def test_attention_takes_the_reference_where_it_is_differentiated_forward():
    q, k, v, moved = torch.randn(4, 2, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), forward_ad.dual_level():
        found = [forward_ad.unpack_dual(f(forward_ad.make_dual(q, moved), k, v)) for f in (attend, reference_attention)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_diffusion_models_weights_are_a_trigflow_network(seed: int):
    """f of TrigFlow is EDM's denoiser with the same raw network, in float32."""
    sigma = torch.tensor([0.002, 0.1, 0.5, 4.0, 80.0])
    spread = (0.25 + sigma**2).sqrt()[:, None, None, None]
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * spread
    raw = Smooth()
    expected = EDMDenoiser(raw, sigma_data=SD)(x, sigma)
    assert relative(TrigFlow(raw, sigma_data=SD, time="log_sigma")(x, sigma), expected) < 1e-6


def test_the_boundary_condition_holds_at_0():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TrigFlow(Smooth(), sigma_data=SD)(x, torch.zeros(2)), x)


RANDOM = [SampleRandomness(seed, tuple(range(8)), torch.device("cpu")) for seed in range(6)]


@pytest.mark.parametrize("random", RANDOM)
@pytest.mark.parametrize("step", [0, 2500, 20000])
@pytest.mark.parametrize(
    ("kind", "derivative"),
    [
        ("sct", "jvp"),
        ("scd", "jvp"),
        ("sct", "central_differences"),
        ("sct", "backward_differences"),
        ("scd", "central_differences"),
        ("scd", "auto"),
    ],
)
def test_the_loss_is_its_formula(kind: str, derivative: str, step: int, random: SampleRandomness):
    """Compares with float64 numpy, where dF/dt is a difference of the network's formula, small or as long as ours."""
    from scipy.stats import norm

    method = SCT(kind="sct", tangent=derivative) if kind == "sct" else SCD(kind="scd", teacher="t", tangent=derivative)
    assert method.derivative == ("backward_differences" if derivative == "auto" else derivative)
    student = Smooth(0.7)
    teacher = TrigFlow(Smooth(1.1), sigma_data=SD, time="log_sigma")
    clean = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(random.seed)) * 2 - 1
    networks = Networks(denoiser_for(method, student), None, teacher)
    with torch.no_grad():
        student.weighting.linear.weight.copy_(torch.linspace(-0.5, 0.5, 16)[None])
    found = build_loss(method, l2)(networks, clean, ScheduleValues(step, 1.0), random)

    def raw(scale: float, x: np.ndarray, c_noise: np.ndarray) -> np.ndarray:
        time = c_noise[:, None, None, None] / 20
        return scale * np.sin(2 * x + time) + 0.3 * np.roll(x, 1, axis=1) * np.cos(time)

    def student_flow(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return -raw(0.7, x / SD, t if kind == "sct" else 250 * np.log(SD * np.tan(t)))

    def expand(value: np.ndarray) -> np.ndarray:
        return value[:, None, None, None]

    t = np.arctan(np.exp(-1.0 + 1.4 * norm.ppf(random.uniform().numpy())) / SD)
    x0, z = clean.double().numpy(), SD * random.noise((3, 4, 4)).double().numpy()
    cos, sin = expand(np.cos(t)), expand(np.sin(t))
    x = cos * x0 + sin * z
    slope = cos * z - sin * x0 if kind == "sct" else -SD * raw(1.1, x / SD, 250 * np.log(SD * np.tan(t)))

    def along(distance: float) -> np.ndarray:
        """F at ln(tan t) + distance, where x_0 = cos x - sin slope and z = sin x + cos slope are constant."""
        time = np.arctan(np.tan(t) * np.exp(distance))
        place = expand(np.cos(time)) * (cos * x - sin * slope) + expand(np.sin(time)) * (sin * x + cos * slope)
        return student_flow(place, time)

    h = 1e-6 if derivative == "jvp" else 0.1
    rate = (along(h) - along(-h)) / (2 * h)  # cos sin dF/dt
    if method.derivative == "backward_differences":
        rate = (3 * along(0) - 4 * along(-h) + along(-2 * h)) / (2 * h)
    g = -(cos**2) * (SD * student_flow(x, t) - slope) - min(1, step / 10000) * (cos * sin * x + SD * rate)
    g = g / (np.sqrt((g**2).reshape(8, -1).sum(1)) + 0.1)[:, None, None, None]
    k = np.arange(1, 9) * (np.log(np.tan(t)) / 4)[:, None]
    w = math.log(48) + np.concatenate([np.cos(k), np.sin(k)], 1) @ np.linspace(-0.5, 0.5, 16)
    expected = np.exp(w) / 48 * (g**2).reshape(8, -1).sum(1) - w
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-4, atol=2e-5)
    assert student.keys == [random.dropout_keys()] * (2 if derivative == "jvp" else 4)


def test_the_gradient_descends_the_consistency_of_neighbours():
    """Autograd gives -2 e^w / D <grad F, g>, where grad F is a central difference."""
    method, random = SCT(kind="sct"), RANDOM[0]
    student = Smooth(0.7)
    flow = denoiser_for(method, student)
    assert isinstance(flow, Flow)
    clean = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = SCTLoss(method)(Networks(flow), clean, ScheduleValues(10**6, 1.0), random)
    loss.sum().backward()
    t = torch.atan(torch.exp(-1.0 + 1.4 * torch.special.ndtri(random.uniform())) / SD)
    noise = SD * random.noise((3, 4, 4)).double()
    cos, sin = (value[:, None, None, None] for value in (t.cos(), t.sin()))
    x, slope = cos * clean + sin * noise, cos * noise - sin * clean
    with torch.no_grad():
        value, rate = flow.flow_and_rate(x / SD, t, slope)
        g = tangent(value, rate, x, slope, t, sigma_data=SD, ratio=1.0)
        g = g / (g.flatten(1).norm(dim=1) + 0.1)[:, None, None, None]
        ends = []
        for nudge in (1e-6, -1e-6):
            student.scale += nudge
            ends.append(flow.flow(x / SD, t))
            student.scale -= nudge
        expected = -2 * ((ends[0] - ends[1]) / 2e-6 * g).sum()  # e^w / D is initially 1
    assert student.scale.grad is not None
    assert student.scale.grad.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_weighting_learns_the_logarithm_of_the_error():
    """e^w E - w has its minimum at w = -ln E: a larger error gets a smaller weight."""
    weighting = Weighting(1)
    weighting.initialise()
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.02)
    t = torch.linspace(0.05, 1.5, 64)
    error = torch.exp(torch.sin(torch.log(torch.tan(t)) / 2))
    for _ in range(600):
        optimizer.zero_grad()
        w = weighting(t)
        (w.exp() * error - w).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weighting(t).detach(), -error.log(), rtol=0, atol=0.05)


def test_the_weighting_stands_beside_the_same_unet_and_is_dropped():
    model = small_model()
    network, plain = build_weighted_unet(model, seed=3), UNet(model)
    assert isinstance(network, WeightedUNet)
    state = network.state_dict()
    plain.load_state_dict(without_weighting(state))
    from cmscale.model import build_unet

    assert all(torch.equal(value, state[name]) for name, value in build_unet(model, seed=3).state_dict().items())
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 1.0])
    output, weight = network(x, t, weight_time=t)
    assert torch.equal(output, plain(x, t))
    assert weight.tolist() == pytest.approx([math.log(768)] * 2, rel=1e-6)


def test_tangents_warm_up_linearly_to_1():
    ratios = [SCT(kind="sct").tangent_ratio(step) for step in (0, 2500, 10000, 10**6)]
    assert ratios == [0.0, 0.25, 1.0, 1.0]
    assert SCT(kind="sct", tangent_warmup_steps=0).tangent_ratio(0) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_samples_in_one_and_two_steps_follow_the_closed_form(seed: int):
    """The second of two steps is at sd tan(1.1), with noise of the full sigma, as f is the identity at 0."""
    data, method = Gaussian.random(4, seed), SCT(kind="sct")
    assert method.boundary == 0.0
    assert consistency_sigmas(method, 2).tolist() == [80.0, pytest.approx(SD * math.tan(1.1), rel=1e-12)]

    def exact(x, sigma, **keywords):
        return data.solve(x, sigma, torch.zeros_like(sigma))

    common = {"seed": seed, "indices": range(4096), "shape": (4,), "clip": False}
    for steps in (1, 2):
        drawn = sample(method, exact, steps=steps, **common).double()
        expected = (data.axes * data.variances) @ data.axes.T
        torch.testing.assert_close(drawn.T.cov(), expected, rtol=0, atol=0.03)
        torch.testing.assert_close(drawn.mean(0), data.mean, rtol=0, atol=0.04)
