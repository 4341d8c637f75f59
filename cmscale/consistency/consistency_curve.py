"""The mean consistency error over many images, as a curve over time."""

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
    """Root mean square differences, averaged over samples, along `times` (descending)."""

    times: list[float]
    neighbours: list[float]  # of f at a time and at the next smaller one, one fewer than times
    to_start: list[float]  # of f at a time and at the largest: the one-step sample

    @property
    def mean(self) -> float:
        """Of neighbouring times, over all of them: the one number that training logs."""
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
    """The mean curve over images (`clean`, of which image i starts from the noise of (seed, indices[i]))."""
    neighbours, to_start, times = [], [], torch.zeros(0)
    for start in range(0, len(clean), batch_size):
        part = clean[start : start + batch_size].to(device)
        own = list(indices)[start : start + batch_size]
        noise = normal_like_samples(seed, own, part.shape[1:], purpose="held-out", device=device)
        error = consistency_error(method, denoise, part, noise=noise, teacher=teacher)
        times = error.times
        neighbours.append(error.neighbours.cpu())
        to_start.append(error.to_start.cpu())
    means = [torch.cat(rows, dim=1).double().mean(1).tolist() for rows in (neighbours, to_start)]
    return ErrorCurve(times.tolist(), *means)
