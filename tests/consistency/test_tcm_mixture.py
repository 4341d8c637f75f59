"""ECT and TCM learn the consistency function of two modes in one dimension up to sigma 80, where sampling starts."""

import copy
from functools import partial

import pytest
import torch
from small_training import BatchRandomness, follow
from torch import Tensor
from two_modes import Raw, draw, exact, noisy, relative

from cmscale.config import ECT, TCM, schedules
from cmscale.consistency.distance import pseudo_huber
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import Denoise
from cmscale.model import denoiser_for

BATCH, STEPS = 64, 1500
HUBER_C = 0.06
SIGMAS = (1.0, 2.0, 10.0, 80.0)


def tcm(weighting: str) -> TCM:
    """TCM with the published noise and boundary, and a gap that a short training reaches."""
    return TCM(kind="tcm", teacher="first", gap=0.02, huber_c=HUBER_C, weighting=weighting)  # pyright: ignore[reportArgumentType]


def trained(method: ECT | TCM, network: Raw, *, first: Denoise | None, steps: int, learning_rate: float) -> Raw:
    """The average over the training of a network with the UNet's time embedding."""
    student, mean = denoiser_for(method, network), copy.deepcopy(network)
    loss = build_loss(method, partial(pseudo_huber, c=HUBER_C))
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        values = schedules.for_method(method, step, learning_rate=0.0, total_steps=steps)
        random = BatchRandomness(step, tuple(range(BATCH)), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(Networks(student, None, first), draw(BATCH, step), values, random).mean().backward()
        optimizer.step()
        follow(mean, network, 0.99)
    return mean


@torch.no_grad()
def errors(f: Denoise) -> dict[float, float]:
    """By sigma the error of f, relative to the standard deviation of the exact one."""
    found = {}
    for sigma in SIGMAS:
        x, expected = noisy(sigma)
        found[sigma] = relative(f(x, torch.full((len(x),), sigma)), expected)
    return found


def exact_first_stage(x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
    """The exact f, which a first stage would have learned."""
    times = sigma.double().repeat_interleave(x[0].numel())
    return exact(x.flatten().double(), times).to(x).reshape(x.shape)


@pytest.mark.parametrize("weighting", ["edm", "inverse_gap"])
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_f_is_learned_within_5_percent_up_to_80_from_an_exact_first_stage(weighting: str):
    method = tcm(weighting)
    mean = trained(method, Raw(seed=0), first=exact_first_stage, steps=STEPS, learning_rate=3e-3)
    found = errors(denoiser_for(method, mean))
    assert max(found.values()) < 0.05, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ect_learns_f_and_tcm_from_it_errs_less_where_sampling_starts():
    """Both stages are learned here; below t' = 1 stage 2 knows what stage 1 does, so that its error there stays."""
    first = ECT(kind="ect", teacher="none", huber_c=HUBER_C, num_stages=6)
    network = trained(first, Raw(seed=0), first=None, steps=4000, learning_rate=3e-3)
    learned = denoiser_for(first, network)
    before = errors(learned)
    assert max(before.values()) < 0.08, before

    @torch.no_grad()
    def frozen(x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
        return learned(x, sigma)

    for weighting in ("edm", "inverse_gap"):
        method = tcm(weighting)
        mean = trained(method, copy.deepcopy(network), first=frozen, steps=STEPS, learning_rate=1e-3)
        after = errors(denoiser_for(method, mean))
        assert after[80.0] < 0.9 * before[80.0], (weighting, before, after)
        assert max(after.values()) < 0.05, (weighting, after)
