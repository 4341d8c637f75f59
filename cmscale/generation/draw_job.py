"""Draws sets of samples on all ranks: the work of `launchers/sample.py` and `cmscale sample`.

Samples are the same on any number of ranks: batches begin at multiples of their size. A command that was interrupted
draws what is missing; a set that exists is left as it is. Memory does not grow with the number of samples.
"""

import sys
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cmscale.config.draw_request import DrawRequest, Format
from cmscale.config.site import use_site
from cmscale.config.source_request import request_from
from cmscale.consistency.solver import Denoise
from cmscale.distributed import collectives
from cmscale.distributed import world as worlds
from cmscale.distributed.world import World
from cmscale.engine.preemption import Preemption
from cmscale.generation.draw import (
    SampleRequest,
    advancing,
    draw_batch,
    evaluations_of,
    machine_of,
    protocol_of,
)
from cmscale.generation.sample_set import GRID_IMAGES, Making, as_array, opened, write_grid
from cmscale.io.counting import Counting
from cmscale.io.fetch import file_sha256, local_file
from cmscale.io.place import Place
from cmscale.runs.requested import check_drawn_by
from cmscale.runs.results import hash_of
from cmscale.runs.sample_sets import place_of_seed, set_place
from cmscale.source import Source, checkpoint_step, load_source

TIMEOUT_MINUTES = 120.0
"""Limit of collectives, which includes the time in which rank 0 writes an array of all samples."""

_LEAST_PART = 64


def main(request: dict[str, Any]) -> str:
    """Draws on all ranks of a job. Returns `finished`, or `preempted` (finished parts are kept)."""
    use_site(interactive=False)
    wanted = request_from(DrawRequest, request)
    preemption = Preemption.install()
    world = worlds.detect(wanted.device)
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        done = draw_sets(wanted, world, preemption=preemption)
    for place in (done or []) if world.is_main else []:
        print(place, flush=True)
    return "preempted" if done is None else "finished"


def run_here(request: DrawRequest) -> list[Place] | None:
    """Draws in this process, which may be one of torchrun's ranks. Returns the places; None if a signal interrupted."""
    preemption = Preemption.install()
    world = worlds.detect(request.device)
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        return draw_sets(request, world, preemption=preemption)


def draw_sets(request: DrawRequest, world: World, *, preemption: Preemption) -> list[Place] | None:
    """Draws the sets of all seeds of a request. Collective. Returns their places; None if a preemption interrupted."""
    work = _Work(request, world, preemption)
    done = []
    with worlds.same_arithmetic(world.device):
        for seed in range(request.seed, request.seed + request.seeds):
            place = work.draw_set(seed)
            if place is None:
                return None
            done.append(place)
    return done


class _Work:
    """What the sets of a request share."""

    def __init__(self, request: DrawRequest, world: World, preemption: Preemption) -> None:
        self._request, self._world, self._preemption = request, world, preemption
        self._format: Format = request.format_asked()
        self._source = load_source(
            request.source,
            weights=request.weights,
            step=checkpoint_step(request.step),
            config=request.config,
            overrides=request.overrides,
        )
        check_drawn_by(request, self._source.config)
        draw = SampleRequest(
            num=request.samples,
            steps=request.steps,
            sampler=request.sampler,
            clip=request.clip and not request.raw,
            batch_size=request.batch_size,
            classes=request.classes_asked,
        )
        shape, method = self._source.image_shape, self._source.config.method
        self._draw = draw.with_files(noise=request.noise, times=request.times, shape=shape, method=method)

    @cached_property
    def _denoise(self) -> Denoise:
        return self._source.denoiser(self._world.device)

    def draw_set(self, seed: int) -> Place | None:
        """Draws the set of one seed, unless it is there. Collective. None if a preemption interrupted."""
        request, draw, world = self._request, replace(self._draw, seed=seed), self._world
        place = set_place(place_of_seed(request.out, seed, request.seeds), self._format)
        grid = None if request.grid is None else place_of_seed(request.grid, seed, request.seeds)
        protocol, machine = collectives.from_main(
            collectives.on_main(lambda: (self._protocol(draw), machine_of(world.device)))
        )
        key = hash_of({**protocol, "format": self._format})
        size = part_size(draw.batch_size)
        with opened(place, key=key, machine=machine, count=draw.num, part_size=size, world=world) as making:
            if making.known is None:
                if not self._draw_missing(making, draw):
                    return None
                making.finish({"source": self._source.origin, **protocol}, grid=grid)
            else:
                collectives.on_main(lambda: self._already(making, draw, grid))
        return place.place

    def _draw_missing(self, making: Making, draw: SampleRequest) -> bool:
        """Draws what is missing on all ranks. Returns False if a preemption interrupted. Collective."""
        world, todo = self._world, making.missing()
        done = draw.num - sum(map(len, todo))
        counting = Counting(
            f"sampling, seed {draw.seed}", total=draw.num, done=done, unit="samples", active=world.is_main
        )
        with counting:  # what all ranks have drawn follows from rank 0's, as their shares are equal
            for part in todo[world.rank :: world.num_ranks]:
                if self._preemption.flagged:
                    break
                denoise = advancing(
                    self._denoise,
                    lambda count: counting.advance(count * world.num_ranks),
                    evaluations=evaluations_of(self._source, draw),
                )
                making.commit(part, draw_part(self._source, denoise, draw, part, raw=self._request.raw, world=world))
        return not self._preemption.requested()

    def _already(self, making: Making, draw: SampleRequest, grid: Place | None) -> None:
        known = making.known
        assert known is not None
        print(f"{making.place.place}: drawn {known.date} already", file=sys.stderr, flush=True)
        if grid is not None:
            first = range(min(GRID_IMAGES, draw.num))
            images = draw_part(self._source, self._denoise, draw, first, raw=self._request.raw, world=self._world)
            write_grid(images, grid)

    def _protocol(self, draw: SampleRequest) -> dict[str, Any]:
        source, request = self._source, self._request
        noise = None if request.noise is None else file_sha256(local_file(request.noise))
        return {
            "step": source.step,
            "weights": source.weights_name,
            **protocol_of(source, draw),
            **({"quantisation": "none"} if request.raw else {}),
            **({} if noise is None else {"noise_sha256": noise}),
            "seed": draw.seed,
            "num_samples": draw.num,
            "batch_size": draw.batch_size,
        }


def part_size(batch_size: int) -> int:
    """Samples of a part: whole batches, so that it begins at a multiple of their size."""
    return batch_size * -(-_LEAST_PART // batch_size)


def draw_part(
    source: Source, denoise: Denoise, draw: SampleRequest, part: range, *, raw: bool, world: World
) -> np.ndarray:
    """The samples of a part, as a set holds them, with one batch on the device."""
    batches = []
    with torch.no_grad():
        for at in range(part.start, part.stop, draw.batch_size):
            indices = range(at, min(at + draw.batch_size, part.stop))
            batches.append(as_array(draw_batch(source, denoise, draw, indices=indices, device=world.device), raw=raw))
    return np.concatenate(batches)
