"""Tests that quantities per image are averaged over the batch and over the quartiles of its noise."""

import numpy as np
import torch

from cmscale.config import SCD
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.model import TrigFlow, denoiser_for
from cmscale.model.weighting import Weighting
from cmscale.rng import SampleRandomness
from cmscale.training.measurements import Measurements

RANDOM = SampleRandomness(3, tuple(range(24)), torch.device("cpu"))


def test_means_are_over_the_batch_and_over_quarters_of_the_uniform_numbers():
    measurements = Measurements()
    measurements.begin(active=True)
    for random in RANDOM.split(8):
        measurements.micro_batch(random)
        measurements.add("square", random.uniform().float() ** 2)
    uniform = RANDOM.uniform().numpy()
    found = measurements.means()
    assert found.keys() == {"square", "square_q1", "square_q2", "square_q3", "square_q4"}
    np.testing.assert_allclose(found["square"], (uniform**2).mean(), rtol=1e-6)
    for quartile in range(4):
        inside = uniform[np.floor(4 * uniform) == quartile]
        assert len(inside)
        np.testing.assert_allclose(found[f"square_q{quartile + 1}"], (inside**2).mean(), rtol=1e-6)


def test_a_quarter_without_images_has_no_mean_and_a_step_that_is_not_logged_has_none():
    measurements, one = Measurements(), RANDOM.split(1)[0]
    measurements.begin(active=True)
    measurements.micro_batch(one)
    measurements.add("loss", torch.ones(1))
    filled = int(4 * one.uniform().item()) + 1
    assert measurements.means() == {"loss": 1.0} | {f"loss_q{q}": 1.0 if q == filled else None for q in range(1, 5)}
    measurements.begin(active=False)
    measurements.micro_batch(one)
    measurements.add("loss", torch.ones(1))
    assert measurements.means() == {}


class Linear(torch.nn.Module):
    """A raw network that returns `factor` times its input, with a weighting."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.weighting = Weighting(12)
        self.weighting.initialise()

    def forward(self, x, c_noise, *, labels=None, dropout_keys=None, weight_time=None):
        out = self.factor * x
        return out if weight_time is None else (out, self.weighting(weight_time))


def test_the_continuous_loss_measures_the_tangent_before_it_is_normalised_and_w():
    """At step 0 the tangent is cos^2(t) times the teacher's F less the student's, times sd."""
    method = SCD(kind="scd", teacher="t", tangent="jvp")
    student, teacher = denoiser_for(method, Linear(0.3)), TrigFlow(Linear(1.1), time="log_sigma")
    found: dict[str, torch.Tensor] = {}
    clean = torch.rand(24, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    build_loss(method, None, measure=found.__setitem__)(Networks(student, None, teacher), clean, AT_0, RANDOM)
    t = np.arctan(np.exp(-1.0 + 1.4 * torch.special.ndtri(RANDOM.uniform()).numpy()) / 0.5)
    noise = 0.5 * RANDOM.noise((3, 2, 2)).double().numpy().reshape(24, -1)
    x = np.cos(t)[:, None] * clean.double().numpy().reshape(24, -1) + np.sin(t)[:, None] * noise
    expected = np.cos(t) ** 2 * np.sqrt((((1.1 - 0.3) * x) ** 2).sum(1))
    np.testing.assert_allclose(found["tangent_norm"].numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(found["weighting"].detach().numpy(), np.log(12), rtol=1e-6)


AT_0 = ScheduleValues(0, 1.0)
