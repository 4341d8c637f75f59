"""The grid of samples from fixed seeds that training saves."""

from functools import partial

import torch

from cmscale.config import Config, schedules
from cmscale.consistency.sampler import sample
from cmscale.distributed import collectives
from cmscale.distributed.world import World
from cmscale.engine.engine import Engine
from cmscale.io import pictures
from cmscale.model.precondition import denoiser_for
from cmscale.runs.folder import RunDir


def save_sample_grid(config: Config, run: RunDir, world: World, engine: Engine, *, step: int) -> None:
    """Saves a grid of samples from fixed seeds under the first EMA, drawn by all ranks. Collective."""
    size, count = config.model.image_size, config.train.sample_count
    share = -(-count // world.num_ranks)
    steps = (
        schedules.at(config, step - 1).num_scales if config.method.facts.sampler == "euler" else None
    )  # as now trained
    indices = range(world.rank * share, (world.rank + 1) * share)  # ZeRO-3 needs equally many evaluations on all ranks
    size_of_pass = config.train.micro_batch_size  # known to fit into memory beside the training state
    with engine.showing(config.ema.names[0]) as network:
        denoise = denoiser_for(config.method, network)
        draw = partial(sample, config.method, denoise, seed=0, steps=steps, shape=(3, size, size), device=world.device)
        images = [draw(indices=indices[at : at + size_of_pass]) for at in range(0, share, size_of_pass)]
    drawn = torch.cat(collectives.gather(torch.cat(images).cpu()))[:count]
    if world.is_main and bool(torch.isfinite(drawn).all()):
        pictures.save_png(pictures.grid(pictures.to_uint8(drawn)), run.sample_grid(step))
