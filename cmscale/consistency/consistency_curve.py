"""Averages the consistency error over many images, to a curve over time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cmscale.config import MethodSection
from cmscale.consistency.consistency_error import consistency_error
from cmscale.consistency.solver import Denoise
from cmscale.rng import normal_like_samples


@dataclass(frozen=True)
class ErrorCurve:
    """Root mean square differences of f along trajectories, averaged over samples.

    Attributes:
        times: Descending times.
        neighbours: f at each time against f at the next smaller one; one fewer than times.
        to_start: f at each time against f at the largest, which is the one-step sample.
    """

    times: list[float]
    neighbours: list[float]
    to_start: list[float]

    @property
    def mean(self) -> float:
        """The mean of `neighbours`, which training logs as consistency_error."""
        return float(np.mean(self.neighbours))


def error_curve(
    method: MethodSection,
    denoise: Denoise,
    clean: torch.Tensor,
    *,
    indices: Sequence[int],
    seed: int = 0,
    teacher: Denoise | None = None,
    batch_size: int = 64,
    device: torch.device,
) -> ErrorCurve:
    """The mean curve over the images `clean` [N, C, H, W].

    Args:
        indices: The noise of image i is a function of (seed, indices[i]).
        teacher: See `consistency_error`.
        batch_size: Images per pass; another number changes the curve by rounding alone.
    """
    neighbours, to_start, times = [], [], torch.zeros(0)
    for start in range(0, len(clean), batch_size):
        part = clean[start : start + batch_size].to(device)
        numbers = list(indices)[start : start + batch_size]
        noise = normal_like_samples(seed, numbers, part.shape[1:], purpose="held-out", device=device)
        error = consistency_error(method, denoise, part, noise=noise, teacher=teacher)
        times = error.times
        neighbours.append(error.neighbours.cpu())
        to_start.append(error.to_start.cpu())
    means = [torch.cat(rows, dim=1).double().mean(1).tolist() for rows in (neighbours, to_start)]
    return ErrorCurve(times.tolist(), *means)
