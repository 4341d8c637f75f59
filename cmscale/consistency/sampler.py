"""Samples from denoisers: multistep sampling for consistency models, ODE samplers for EDM, noise keyed per sample."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

from cmscale.config import MethodSection
from cmscale.consistency import grid
from cmscale.consistency.solver import Denoise, euler_step, evaluate, expand_as, heun_step, slope
from cmscale.rng import normal_like_samples

Draw = Callable[[int], Tensor]
"""(number of the draw, from 1) -> new standard normal noise for the batch."""
Sampler = Literal["heun", "euler", "dpm2", "ancestral"]


def clipped(denoise: Denoise) -> Denoise:
    """The denoiser with estimates clamped to [-1, 1], the default of the released code's samplers and diffusers'."""

    def denoise_clipped(x: Tensor, sigma: Tensor, **keywords: object) -> Tensor:
        return denoise(x, sigma, **keywords).clamp(-1, 1)

    return denoise_clipped


@torch.no_grad()
def multistep(denoise: Denoise, noise: Tensor, sigmas: Tensor, *, draw: Draw, sigma_min: float) -> Tensor:
    """Multistep consistency sampling, one evaluation per time; Consistency Models, algorithm 1.

    Args:
        noise: Start noise of unit variance, [B, C, H, W]; it is scaled by sigmas[0].
        sigmas: Descending times, [steps] float64.
    """
    x = evaluate(denoise, expand_as(sigmas[:1], noise) * noise, _batch(sigmas[0], noise))
    for number, sigma in enumerate(sigmas[1:], start=1):
        spread = (sigma**2 - sigma_min**2).clamp(min=0).sqrt()
        noisy = x + expand_as(spread, x) * draw(number).to(x)
        x = evaluate(denoise, noisy, _batch(sigma, x))
    return x


@torch.no_grad()
def heun(denoise: Denoise, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Heun steps along `sigmas`, then an Euler step to the last, which is 0: 2N - 1 evaluations; EDM, algorithm 1."""
    x = expand_as(sigmas[:1], noise) * noise
    for t, s in _pairs(sigmas):
        step = heun_step if s > 0 else euler_step
        x = step(denoise, x, _batch(t, x), _batch(s, x))
    return x


@torch.no_grad()
def euler(denoise: Denoise, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Euler steps along `sigmas`, the last of which is 0: one evaluation per step."""
    x = expand_as(sigmas[:1], noise) * noise
    for t, s in _pairs(sigmas):
        x = euler_step(denoise, x, _batch(t, x), _batch(s, x))
    return x


@torch.no_grad()
def dpm2(denoise: Denoise, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Midpoint steps (DPM-Solver-2) with the midpoint on a rho = 3 curve: two evaluations per step.

    This is the released code's variant; k-diffusion uses the logarithmic midpoint and ends with an Euler step.
    """
    x = expand_as(sigmas[:1], noise) * noise
    for t, s in _pairs(sigmas):
        middle = ((t ** (1 / 3) + s ** (1 / 3)) / 2) ** 3
        halfway = euler_step(denoise, x, _batch(t, x), _batch(middle, x))
        x = x + expand_as((s - t).reshape(1), x) * slope(denoise, halfway, _batch(middle, x))
    return x


@torch.no_grad()
def ancestral(denoise: Denoise, noise: Tensor, sigmas: Tensor, *, draw: Draw) -> Tensor:
    """Euler ancestral steps from t to s: down to sqrt(s^2 - up^2), then noise of std up = s sqrt(t^2 - s^2) / t."""
    x = expand_as(sigmas[:1], noise) * noise
    for number, (t, s) in enumerate(_pairs(sigmas), start=1):
        up = s * (t**2 - s**2).sqrt() / t
        down = s**2 / t
        x = euler_step(denoise, x, _batch(t, x), _batch(down, x))
        if s > 0:
            x = x + expand_as(up.reshape(1), x) * draw(number).to(x)
    return x


def sample(
    method: MethodSection,
    denoise: Denoise,
    *,
    seed: int,
    indices: Sequence[int],
    steps: int | None = None,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    noise: Tensor | None = None,
    sigmas: Tensor | None = None,
    sampler: Sampler = "heun",
    clip: bool = True,
) -> Tensor:
    """Draws samples [len(indices), *shape] from a trained denoiser.

    All that enters the denoiser for sample i depends on (seed, i) alone. A network may round differently in a batch of
    another size or order, so samples are equal to the bit if their batches are equal.

    Args:
        steps: Sampling steps; by default method.default_sampling_steps.
        noise: Unit-variance start noise, in place of noise drawn from the seed.
        sigmas: Descending times, in place of `default_sigmas`; for EDM they end with 0.
        sampler: The sampler of an EDM model. Other methods have only one, `method.facts.sampler`.
        clip: Clamp every estimate to [-1, 1], as the released code does.
    """
    if noise is None:
        noise = normal_like_samples(seed, indices, shape, purpose="start", device=device)
    noise = noise.to(device)
    denoise = clipped(denoise) if clip else denoise

    def draw(number: int) -> Tensor:
        return normal_like_samples(seed, indices, shape, purpose=f"step-{number}", device=device)

    times = default_sigmas(method, steps) if sigmas is None else sigmas
    match method.facts.sampler:
        case "multistep":
            return multistep(denoise, noise, times, draw=draw, sigma_min=method.boundary)
        case "euler":  # an Euler step to 0 returns the last estimate
            return euler(denoise, noise, torch.cat([times, times.new_zeros(1)]))
        case "ode":
            return _solve(denoise, noise, times, draw=draw, sampler=sampler)
    assert_never(method.facts.sampler)


def _solve(denoise: Denoise, noise: Tensor, times: Tensor, *, draw: Draw, sampler: Sampler) -> Tensor:
    match sampler:
        case "heun":
            return heun(denoise, noise, times)
        case "euler":
            return euler(denoise, noise, times)
        case "dpm2":
            return dpm2(denoise, noise, times)
        case "ancestral":
            return ancestral(denoise, noise, times, draw=draw)
    assert_never(sampler)


def default_sigmas(method: MethodSection, steps: int | None = None) -> Tensor:
    """The descending times at which `sample` evaluates by default, float64; those of an ODE sampler end with 0."""
    steps = steps or method.default_sampling_steps
    if method.facts.sampler == "ode":
        return grid.ode_sigmas(method, steps)
    return grid.consistency_sigmas(method, steps)


def num_evaluations(method: MethodSection, steps: int, sampler: Sampler = "heun") -> int:
    """NFE: network evaluations per sample in `sample`."""
    if method.facts.sampler != "ode" or sampler in ("euler", "ancestral"):
        return steps
    return 2 * steps if sampler == "dpm2" else 2 * steps - 1


def _pairs(sigmas: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(itertools.pairwise(sigmas))


def _batch(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x.device).expand(len(x))
