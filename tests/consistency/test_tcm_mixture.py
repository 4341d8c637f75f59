"""TCM learns the consistency function of two modes in one dimension from t' = 1 to sigma 80, where sampling starts."""

import copy
from functools import partial

import pytest
import torch
from small_training import BatchRandomness, follow
from torch import Tensor
from two_modes import Raw, draw, exact, noisy, relative

from cmscale.config import TCM, schedules
from cmscale.consistency.distance import pseudo_huber
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.model import denoiser_for

BATCH, STEPS = 64, 1500
HUBER_C = 0.06


def first_stage(x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
    """The exact f, which a first stage would have learned."""
    times = sigma.double().repeat_interleave(x[0].numel())
    return exact(x.flatten().double(), times).to(x).reshape(x.shape)


@pytest.mark.parametrize("weighting", ["edm", "inverse_gap"])
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_f_is_learned_within_5_percent_up_to_80_from_an_exact_first_stage(weighting: str):
    """With the published noise and boundary, and a gap that a short training reaches; the UNet's time embedding."""
    method = TCM(kind="tcm", teacher="exact", gap=0.02, huber_c=HUBER_C, weighting=weighting)  # pyright: ignore[reportArgumentType]
    network = Raw(seed=0)
    student, mean = denoiser_for(method, network), copy.deepcopy(network)
    loss = build_loss(method, partial(pseudo_huber, c=HUBER_C))
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    for step in range(STEPS):
        random = BatchRandomness(step, tuple(range(BATCH)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        networks = Networks(student, None, first_stage)
        loss(networks, draw(BATCH, step), schedules.ScheduleValues(step, 0.0), random).mean().backward()
        optimizer.step()
        follow(mean, network, 0.99)
    found = {}
    for sigma in (1.0, 2.0, 10.0, 80.0):
        x, expected = noisy(sigma)
        with torch.no_grad():
            found[sigma] = relative(denoiser_for(method, mean)(x, torch.full((len(x),), sigma)), expected)
    assert max(found.values()) < 0.05, found
