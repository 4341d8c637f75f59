"""Owns the consistency error of whole networks: mean curves over images, and the probe that training takes.

Held out are the trajectories: noise under a purpose of its own and 100 times off every training grid. So are the
images, where a data set of its own is named (LSUN has `val`); else they are the first ones of the training data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cmscale import pictures, schedules
from cmscale import world as worlds
from cmscale.config import CD, SCD, Config, Diffusion
from cmscale.consistency.error import consistency_error
from cmscale.consistency.solver import Denoise
from cmscale.data import read_images
from cmscale.engine.engine import Engine
from cmscale.errors import UserError
from cmscale.model.choice import denoiser_for
from cmscale.rng import normal_like_samples
from cmscale.world import World

PROBE_IMAGES = 16


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


def held_out_images(url: str, *, count: int, size: int) -> torch.Tensor:
    """The first `count` images of a prepared data set (all, where it has fewer), [N, 3, size, size] in [-1, 1].

    Raises:
        UserError: no data set there, or one of another size.
    """
    found = [torch.from_numpy(image.copy()) for image, _ in read_images(url, limit=count)]
    if found[0].shape[:2] != (size, size):
        raise UserError(f"{url}: its images have {found[0].shape[0]} pixels a side, the network takes {size}")
    return pictures.from_uint8(torch.stack(found).permute(0, 3, 1, 2))


def error_curve(
    method: Diffusion,
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


def follows_teacher(method: Diffusion) -> bool:
    """Whether a method's trajectories are its teacher's ODE (distillation), not straight lines x + t z."""
    return isinstance(method, CD | SCD)


class Probe:
    """Measures the first EMA's consistency error on a fixed batch while training, drawing no number that training does.

    Every `train.consistency_error_every` steps and at the last; 0 is never.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        if not config.train.consistency_error_every:
            return
        share = -(-PROBE_IMAGES // world.num_ranks)
        indices = range(world.rank * share, (world.rank + 1) * share)
        url = config.train.consistency_error_data or config.data.path
        images = held_out_images(url, count=PROBE_IMAGES, size=config.model.image_size)
        # All ranks evaluate as often, as ZeRO-3 needs it: with many ranks or few images, images come again.
        self._indices = [index % len(images) for index in indices]
        self._clean = images[self._indices]

    def after(self, step: int, engine: Engine, teacher: Denoise | None) -> float | None:
        """The mean error over neighbouring times and images; None where none is due after this step. Collective."""
        method, train = self._config.method, self._config.train
        if not schedules.is_due(step, train.consistency_error_every, train.total_steps):
            return None
        with engine.showing(self._config.ema.names[0]) as network:
            curve = error_curve(
                method,
                denoiser_for(method, network),
                self._clean,
                indices=self._indices,
                teacher=teacher if follows_teacher(method) else None,
                device=self._world.device,
            )
        return float(np.mean(worlds.gather(curve.mean)))
