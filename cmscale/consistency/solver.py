"""Takes single steps of the probability flow ODE, dx/dt = (x - D(x, t)) / t, by Euler's and by Heun's rule."""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[..., Tensor]
"""(x [B, ...], sigma [B], *, dropout_keys=None) -> estimate of the clean x."""

Step = Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]
"""(denoise, x at t, t [B], s [B]) -> x at s."""


ADDIM_SHARE = 0.75
"""Of the squared distance between clean images and their estimates, by which aDDIM corrects; Heek et al. 2024, A.1."""


def expand_as(time: Tensor, x: Tensor) -> Tensor:
    """Times [B] in x's dtype, reshaped to multiply x [B, ...]."""
    return time.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def evaluate(denoise: Denoise, x: Tensor, time: Tensor, **keywords: object) -> Tensor:
    """denoise(x, time), with the times in x's dtype."""
    return denoise(x, time.to(device=x.device, dtype=x.dtype), **keywords)


def slope(denoise: Denoise, x: Tensor, time: Tensor) -> Tensor:
    """dx/dt = (x - D(x, t)) / t; EDM, equation 3; Consistency Models, equation 3."""
    return (x - evaluate(denoise, x, time)) / expand_as(time, x)


def euler_step(denoise: Denoise, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x at s from x at t by Euler's rule, order 1. Times are [B]; float64 keeps their differences exact."""
    return x + expand_as(s - t, x) * slope(denoise, x, t)


def heun_step(denoise: Denoise, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x at s > 0 from x at t by Heun's rule, order 2; EDM, algorithm 1, lines 4 to 8. Two evaluations."""
    first = slope(denoise, x, t)
    second = slope(denoise, x + expand_as(s - t, x) * first, s)
    return x + expand_as((s - t) / 2, x) * (first + second)


def toward(estimate: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x at s from x at t on the straight line to an estimate of the clean x: one step of DDIM, or Euler's."""
    return estimate + expand_as(s / t, x) * (x - estimate)


def euler_estimate(denoise: Denoise, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The estimate towards which `euler_step` goes."""
    del s
    return evaluate(denoise, x, t)


def heun_estimate(denoise: Denoise, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The estimate towards which a straight line from t meets s > 0 where `heun_step` ends; two evaluations.

    x - t (d + d')/2 with Heun's slopes d = (x - D)/t and d' = (x' - D')/s is ((2 - t/s) D + (t/s) D') / 2.
    """
    first = evaluate(denoise, x, t)
    second = evaluate(denoise, toward(first, x, t, s), s)
    return first + expand_as(t / s / 2, x) * (second - first)


def addim_estimate(denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, *, clean: Tensor) -> Tensor:
    """The estimate towards which a straight line from t meets s where aDDIM ends; Heek et al. 2024, algorithm 3.

    With D the estimate at t and e = (x - D)/t, DDIM ends at D + s e, whose norm is too small, as D is a mean. aDDIM
    ends at D + s' e, s'^2 = s^2 + v (1 - s/t)^2, v = `ADDIM_SHARE` ||clean - D||^2 / ||e||^2. The line meets that point
    on its way to D + v (1 - s/t) / (s + s') e, which is (s' - s) / (1 - s/t) e without the difference.
    """
    mean = evaluate(denoise, x, t)
    noise = (x - mean) / expand_as(t, x)
    length = noise.square().flatten(1).sum(1).clamp(min=torch.finfo(noise.dtype).tiny)
    spread = ADDIM_SHARE * (clean - mean).square().flatten(1).sum(1) / length
    elapsed, low = (1 - s / t).to(spread), s.to(spread)
    factor = spread * elapsed / (low + (low**2 + spread * elapsed**2).sqrt())
    return mean + expand_as(factor, x) * noise


STEPS: dict[str, Step] = {"euler": euler_step, "heun": heun_step}
ESTIMATES: dict[str, Step] = {"euler": euler_estimate, "heun": heun_estimate}
