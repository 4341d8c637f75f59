"""Saves grids during training: samples from fixed seeds, and training images to see them beside."""

from functools import partial
from pathlib import Path

import torch
from PIL import Image

from cmscale.config import Config, schedules
from cmscale.consistency.sampler import sample
from cmscale.data import Batch
from cmscale.distributed import collectives
from cmscale.distributed.world import World
from cmscale.engine.engine import Engine
from cmscale.io import image_tensors
from cmscale.io.remarks import dispensable
from cmscale.model.precondition import denoiser_for
from cmscale.runs.folder import RunDir


class Grids:
    """The grids of a run with `train.sample_every`, among them one of step 0."""

    def __init__(self, config: Config, run: RunDir, world: World, engine: Engine) -> None:
        self._config, self._run, self._world, self._engine = config, run, world, engine
        self._is_real_missing = world.is_main and config.train.sample_every > 0 and not run.real_images.exists()

    def begin(self, *, fresh: bool) -> None:
        """Saves what the network draws before its first step, if training is about to begin. Collective."""
        if fresh and self._config.train.sample_every > 0:
            save_sample_grid(self._config, self._run, self._world, self._engine, step=0)

    def after(self, step: int, batch: Batch) -> None:
        """Saves what is due after an applied step. Collective.

        Args:
            batch: This rank's images of the step. Rank 0's of the first one that it sees are saved.
        """
        train = self._config.train
        if self._is_real_missing:
            self._is_real_missing = False
            _save(image_tensors.grid(batch.images[: train.sample_count]), self._run.real_images, self._run)
        if schedules.is_due(step, train.sample_every, train.total_steps):
            save_sample_grid(self._config, self._run, self._world, self._engine, step=step)


def save_sample_grid(config: Config, run: RunDir, world: World, engine: Engine, *, step: int) -> None:
    """Draws `train.sample_count` samples of the first EMA on all ranks and saves them as a PNG. Collective."""
    size, count = config.model.image_size, config.train.sample_count
    share = -(-count // world.num_ranks)
    steps = schedules.at(config, max(step - 1, 0)).sampling_steps
    indices = range(world.rank * share, (world.rank + 1) * share)  # ZeRO-3 needs equally many evaluations on all ranks
    batch_size = config.train.micro_batch_size  # fits into memory together with the training state
    with engine.showing(config.ema.names[0]) as network:
        denoise = denoiser_for(config.method, network)
        draw = partial(sample, config.method, denoise, seed=0, steps=steps, shape=(3, size, size), device=world.device)
        images = [draw(indices=indices[start : start + batch_size]) for start in range(0, share, batch_size)]
    drawn = torch.cat(collectives.gather(torch.cat(images).cpu()))[:count]
    if world.is_main and bool(torch.isfinite(drawn).all()):
        _save(image_tensors.grid(image_tensors.to_uint8(drawn)), run.sample_grid(step), run)


def _save(picture: Image.Image, path: Path, run: RunDir) -> None:
    with dispensable(path.name):
        image_tensors.save_png(picture, path, within=run.root)
