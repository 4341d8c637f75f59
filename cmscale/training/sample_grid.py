"""Saves a grid of samples from fixed seeds during training."""

from functools import partial

import torch

from cmscale.config import Config, schedules
from cmscale.consistency.sampler import sample
from cmscale.distributed import collectives
from cmscale.distributed.world import World
from cmscale.engine.engine import Engine
from cmscale.io import image_tensors
from cmscale.model.precondition import denoiser_for
from cmscale.runs.folder import RunDir


def save_sample_grid(config: Config, run: RunDir, world: World, engine: Engine, *, step: int) -> None:
    """Draws `train.sample_count` samples of the first EMA on all ranks and saves them as a PNG. Collective."""
    size, count = config.model.image_size, config.train.sample_count
    share = -(-count // world.num_ranks)
    steps = schedules.at(config, step - 1).sampling_steps
    indices = range(world.rank * share, (world.rank + 1) * share)  # ZeRO-3 needs equally many evaluations on all ranks
    batch_size = config.train.micro_batch_size  # fits into memory together with the training state
    with engine.showing(config.ema.names[0]) as network:
        denoise = denoiser_for(config.method, network)
        draw = partial(sample, config.method, denoise, seed=0, steps=steps, shape=(3, size, size), device=world.device)
        images = [draw(indices=indices[start : start + batch_size]) for start in range(0, share, batch_size)]
    drawn = torch.cat(collectives.gather(torch.cat(images).cpu()))[:count]
    if world.is_main and bool(torch.isfinite(drawn).all()):
        image_tensors.save_png(image_tensors.grid(image_tensors.to_uint8(drawn)), run.sample_grid(step))
