"""Owns the consistency error: how far f is from constant along held-out trajectories, at unseen times."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cmscale.config import MethodSection
from cmscale.consistency import grid
from cmscale.consistency.solver import Denoise, evaluate, expand_as, heun_step


@dataclass(frozen=True)
class ConsistencyError:
    """Root mean square differences over an image, per sample; rows follow the descending times.

    Average a row over samples (of any number of batches) for its curve.
    """

    times: Tensor  # [T] float64, descending
    neighbours: Tensor  # [T - 1, B]: f(x_t, t) to f(x_s, s) of the next time s
    to_start: Tensor  # [T, B]: f(x_t, t) to f at the first and largest time, which is the one-step sample


@torch.no_grad()
def consistency_error(
    method: MethodSection,
    denoise: Denoise,
    clean: Tensor,
    *,
    noise: Tensor,
    teacher: Denoise | None = None,
    count: int = 100,
) -> ConsistencyError:
    """||f(x_t, t) - f(x_s, s)|| / sqrt(D) along `count` times of each sample's trajectory.

    Args:
        denoise: The consistency function.
        clean: Held-out images [B, C, H, W].
        noise: Standard normal, of clean's shape: where each trajectory starts.
        teacher: An EDM denoiser: trajectories are its ODE (Heun from the largest time), as CD has them.
            Without one they are clean + t noise, as CT has them.
    """
    times = grid.held_out_times(method, count).flip(0)
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
