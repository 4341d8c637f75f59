"""Measures the consistency error: how much f changes along trajectories, at times that training does not use."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import MethodSection
from cmscale.consistency import grid
from cmscale.consistency.solver import Denoise, evaluate, expand_as, heun_step

TIMES = 100
"""On a trajectory."""


@dataclass(frozen=True)
class ConsistencyError:
    """Root mean square differences over the values of an image, per time and sample.

    Attributes:
        times: [T] float64, descending.
        neighbours: [T - 1, B], f(x_t, t) against f(x_s, s) at the next smaller time s.
        to_start: [T, B], f(x_t, t) against f at the largest time, which is the one-step sample.
    """

    times: Tensor
    neighbours: Tensor
    to_start: Tensor


@torch.no_grad()
def consistency_error(
    method: MethodSection,
    denoise: Denoise,
    clean: Tensor,
    *,
    noise: Tensor,
    teacher: Denoise | None = None,
    count: int = TIMES,
) -> ConsistencyError:
    """||f(x_t, t) - f(x_s, s)|| / sqrt(D) along `count` times of each sample's trajectory.

    Args:
        denoise: The consistency function.
        clean: Images [B, C, H, W].
        noise: Standard normal noise of clean's shape, from which each trajectory starts.
        teacher: An EDM denoiser. With it, trajectories are solutions of its ODE (Heun's rule from the largest time),
            as in CD; without it, they are clean + t noise, as in CT.
    """
    times = grid.off_grid_times(method, count).flip(0)
    neighbours: list[Tensor] = []
    to_start: list[Tensor] = []
    first = previous = None
    for x, time in _trajectory(clean, noise, times, teacher):
        estimate = evaluate(denoise, x, time.to(x.device).expand(len(x)))
        if first is None or previous is None:
            first = estimate
        else:
            neighbours.append(_rms(estimate - previous))
        previous = estimate
        to_start.append(_rms(estimate - first))
    return ConsistencyError(times, torch.stack(neighbours), torch.stack(to_start))


def _trajectory(
    clean: Tensor, noise: Tensor, times: Tensor, teacher: Denoise | None
) -> Iterator[tuple[Tensor, Tensor]]:
    x = clean + expand_as(times[:1], clean) * noise
    yield x, times[0]
    for t, s in zip(times[:-1].to(clean.device), times[1:].to(clean.device), strict=True):
        if teacher is None:
            x = clean + expand_as(s.reshape(1), clean) * noise
        else:
            x = heun_step(teacher, x, t.expand(len(x)), s.expand(len(x)))
        yield x, s


def _rms(difference: Tensor) -> Tensor:
    return difference.flatten(1).square().mean(1).sqrt()
