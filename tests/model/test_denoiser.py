"""Compares the preconditioning with its formulas in float64; the boundary condition must hold exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import relative

from cmscale.config import CD, EDM
from cmscale.model import ConsistencyDenoiser, EDMDenoiser, denoiser_for
from cmscale.model.denoiser import c_noise

SD, EPS = 0.5, 0.002
SIGMAS = torch.tensor([0.002, 0.0021, 0.1, 0.5, 3.991, 80.0])


def noisy() -> torch.Tensor:
    return torch.randn(len(SIGMAS), 3, 4, 4, generator=torch.Generator().manual_seed(0)) * SIGMAS[:, None, None, None]


class Recorder:
    """A raw network that records its inputs."""

    def __call__(self, x, c_noise, *, labels=None, dropout_keys=None):
        self.x, self.c_noise, self.labels, self.dropout_keys = x, c_noise, labels, dropout_keys
        return torch.sin(3 * x) + c_noise[:, None, None, None] / 100


def by_formula(x: np.ndarray, sigma: np.ndarray, skip: np.ndarray, out: np.ndarray) -> np.ndarray:
    scaled = x / np.sqrt(sigma**2 + SD**2)
    raw = np.sin(3 * scaled) + 250 * np.log(sigma) / 100
    return skip * x + out * raw


def test_the_consistency_function_is_its_formula():
    x, sigma = noisy().double().numpy(), SIGMAS.double().numpy()[:, None, None, None]
    skip = SD**2 / ((sigma - EPS) ** 2 + SD**2)
    out = SD * (sigma - EPS) / np.sqrt(sigma**2 + SD**2)
    assert relative(ConsistencyDenoiser(Recorder())(noisy(), SIGMAS), by_formula(x, sigma, skip, out)) < 1e-6


def test_the_edm_denoiser_is_its_formula():
    x, sigma = noisy().double().numpy(), SIGMAS.double().numpy()[:, None, None, None]
    skip = SD**2 / (sigma**2 + SD**2)
    out = SD * sigma / np.sqrt(sigma**2 + SD**2)
    assert relative(EDMDenoiser(Recorder())(noisy(), SIGMAS), by_formula(x, sigma, skip, out)) < 1e-6


@given(
    sigma_min=st.floats(1e-4, 1.0),
    sigma_data=st.floats(0.05, 5.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_the_boundary_condition_holds_bit_for_bit(sigma_min, sigma_data, dtype, seed):
    x = 100 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    denoiser = ConsistencyDenoiser(Recorder(), sigma_data=sigma_data, sigma_min=sigma_min)
    assert torch.equal(denoiser(x, torch.full((2,), sigma_min, dtype=dtype)), x)


def test_the_networks_input_has_unit_variance_on_data_of_the_assumed_variance():
    source = torch.Generator().manual_seed(0)
    for sigma in (0.01, 0.5, 80.0):
        raw = Recorder()
        clean, noise = (torch.randn(4, 3, 64, 64, generator=source) for _ in range(2))
        EDMDenoiser(raw)(SD * clean + sigma * noise, torch.full((4,), sigma))
        assert raw.x.std().item() == pytest.approx(1, rel=0.02)


def test_the_noise_level_reaches_the_network_as_the_released_code_has_it():
    expected = 250 * np.log(SIGMAS.double().numpy())
    assert np.abs(c_noise(SIGMAS).numpy() - expected).max() < 2 * 1553 * 2.0**-24
    assert torch.equal(c_noise(SIGMAS.double()), c_noise(SIGMAS))
    assert torch.isfinite(c_noise(torch.zeros(1))).all()


@pytest.mark.parametrize("kind", [EDMDenoiser, ConsistencyDenoiser])
def test_labels_and_dropout_keys_reach_the_network_and_outputs_are_float32(kind):
    raw, labels = Recorder(), torch.arange(len(SIGMAS))
    found = kind(raw)(noisy().double(), SIGMAS.double(), labels=labels, dropout_keys=(1, 2))
    assert raw.labels is labels
    assert raw.dropout_keys == (1, 2)
    assert found.dtype == torch.float32
    assert raw.x.dtype == torch.float32


def test_each_method_gets_its_own_denoiser_and_constants():
    raw = Recorder()
    assert denoiser_for(EDM(kind="edm", sigma_data=0.7), raw) == EDMDenoiser(raw, sigma_data=0.7)
    method = CD(kind="cd", teacher="t", sigma_data=0.6, sigma_min=0.01)
    assert denoiser_for(method, raw) == ConsistencyDenoiser(raw, sigma_data=0.6, sigma_min=0.01)
