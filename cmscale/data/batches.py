"""Streams training batches without end: each rank gets its share, and any sample can be the first."""

import atexit
import contextlib
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from cmscale.config import Data
from cmscale.data.ahead import Fetch, Prefetcher
from cmscale.data.order import Order
from cmscale.data.rank_batches import RankBatches, RawBatch
from cmscale.data.samples import Samples, open_samples
from cmscale.data.workers import start_worker
from cmscale.distributed.world import World
from cmscale.errors import UserError
from cmscale.io.patience import is_waiting
from cmscale.runs.manifests import DatasetManifest


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, on the CPU.

    Attributes:
        images: uint8 [b, 3, H, W], channels-last strides, pinned if the device is CUDA, not yet mirrored.
        positions: Each sample's position in the endless training sequence.
        keys: Each sample's key in the data set.
        flips: bool [b], which images to mirror.
    """

    images: torch.Tensor
    positions: tuple[int, ...]
    keys: tuple[str, ...]
    flips: torch.Tensor


def to_device(batch: Batch, device: torch.device) -> torch.Tensor:
    """The batch's images on the device, mirrored and normalised: float32 [b, 3, H, W] in [-1, 1].

    They are copied as uint8, a quarter of the size.
    """
    images = batch.images.to(device, non_blocking=True)
    flip = batch.flips.to(device, non_blocking=True)
    scaled = images.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1.0
    return torch.where(flip[:, None, None, None], scaled.flip(-1), scaled)


def worker_cautions(workers: int) -> list[str]:
    """One line if a rank is asked for more processes than it may use processors."""
    processors = len(os.sched_getaffinity(0))
    if workers <= processors:
        return []
    return [
        f"data.workers: {workers} processes load images for each rank, which may use {processors} processors; "
        f"set data.workers={processors} or fewer"
    ]


class _Cursors(Sampler[int]):
    """Yields start, start + step, ... without end."""

    def __init__(self, start: int, step: int) -> None:
        self.start = start
        self.step = step

    def __iter__(self) -> Iterator[int]:
        cursor = self.start
        while True:
            yield cursor
            cursor += self.step


class Batches:
    """Endless iterator of (Batch, cursor); the cursor is the number of samples that all ranks have consumed.

    A new iterator with `start_cursor=cursor` continues the same sequence, on any number of ranks and workers.

    Attributes:
        bad: Undecodable samples that this rank replaced so far: key -> reason.
        bad_shards: Bad shards that this rank replaced so far: name -> reason.
    """

    def __init__(self, batches: RankBatches, *, config: Data, world: World, start_cursor: int, lookahead: int) -> None:
        self.dataset: DatasetManifest = batches.samples.manifest
        self.bad: dict[str, str] = {}
        self.bad_shards: dict[str, str] = {}
        self._url = batches.samples.url
        self._max_bad = config.max_bad_samples
        self._max_bad_shards = config.max_bad_shards
        self._step = batches.global_batch_size
        self._cursor = start_cursor
        self._fetch: Fetch | None = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # twice, of what `worker_cautions` says
            loader = DataLoader(
                batches,
                batch_size=None,
                sampler=_Cursors(start_cursor, self._step),
                num_workers=config.workers,
                prefetch_factor=config.prefetch_batches if config.workers else None,
                # Forked: they start at once and share the record of verified shards; they never use CUDA.
                multiprocessing_context="fork" if config.workers else None,
                worker_init_fn=start_worker,
                pin_memory=world.device.type == "cuda",
            )
            self._iterator: Any = iter(loader)  # forks the workers, so it comes before the thread below
        self._prefetcher = None if batches.samples.cache.in_place else Prefetcher(batches, lookahead)
        if self._prefetcher:
            self._prefetcher.move_to(start_cursor)
        reference = weakref.ref(self)
        # Workers ignore SIGTERM, so multiprocessing's own clean-up at exit would not return.
        atexit.register(lambda: (it := reference()) and it.close())

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        return self

    def wait(self, seconds: float, *, leave: Callable[[], bool] = lambda: False) -> bool:
        """Waits until `next` returns or raises at once. Returns whether it would.

        Args:
            seconds: After so long it returns False, but only while storage does not answer.
            leave: Asked about once a second; where it says so, it returns False.
        """
        if self._fetch is None:
            self._fetch = Fetch(self._iterator)
        until = time.monotonic() + seconds
        while not self._fetch.done.wait(min(1.0, seconds)):
            if leave() or (is_waiting() and time.monotonic() >= until):
                return False
        return True

    def __next__(self) -> tuple[Batch, int]:
        fetch, self._fetch = self._fetch or Fetch(self._iterator), None
        try:
            raw = fetch.result()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"a DataLoader worker ended before it returned its batch ({error!r})") from error
        if isinstance(raw, Exception):
            raise raw
        self._count_bad(raw)
        self._cursor += self._step
        if self._prefetcher:
            self._prefetcher.move_to(self._cursor)
        return Batch(raw.pixels.permute(0, 3, 1, 2), raw.positions, raw.keys, raw.flips), self._cursor

    def _count_bad(self, raw: RawBatch) -> None:
        self.bad |= raw.bad
        self.bad_shards |= raw.bad_shards
        if len(self.bad_shards) > self._max_bad_shards:
            why = next(reversed(self.bad_shards.values()))
            allowed = f"; data.max_bad_shards allows {self._max_bad_shards}" if self._max_bad_shards else ""
            raise RuntimeError(f"{why}{allowed}")
        if len(self.bad) > self._max_bad:
            key, why = next(reversed(self.bad.items()))
            raise RuntimeError(
                f"{self._url}: {len(self.bad)} undecodable images on this rank, data.max_bad_samples allows "
                f"{self._max_bad}; the last one is {key}: {why}"
            )

    def close(self) -> None:
        """Ends workers and threads; calling it again does nothing."""
        if self._prefetcher:
            self._prefetcher.stop()
        iterator, self._iterator = self._iterator, iter(())
        workers = list(getattr(iterator, "_workers", ()))
        if workers:
            # torch raises the death of a worker out of a signal handler: here it would replace the error that is known.
            with contextlib.suppress(RuntimeError):
                iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()


def open_batches(
    config: Data,
    world: World,
    *,
    seed: int,
    global_batch_size: int,
    image_size: int,
    start_cursor: int = 0,
    samples: Samples | None = None,
) -> Batches:
    """Opens the data set at `config.path` for this rank.

    The sequence of samples depends only on the data set, seed, num_canonical_nodes and shuffle_block; a global batch is
    its next `global_batch_size` samples. A data set smaller than a batch is repeated within the batch.

    Args:
        samples: From `open_samples`, if it was called.

    Raises:
        UserError: there is no data set, its images have another size, or the ranks cannot share the batch evenly.
    """
    samples = samples or open_samples(config)
    manifest = samples.manifest
    if manifest.image_size != image_size:
        raise UserError(
            f"data.path: {samples.url} holds images of {manifest.image_size} px, model.image_size is "
            f"{image_size}; prepare it with --image-size {image_size}, or change model.image_size"
        )
    if global_batch_size % world.num_ranks:
        raise UserError(
            f"train.global_batch_size: {global_batch_size} is not divisible by the number of ranks, {world.num_ranks}"
        )
    order = Order(
        tuple(shard.count for shard in manifest.shards),
        config.num_canonical_nodes,
        seed,
        config.shuffle_block,
    )
    batches = RankBatches(samples, order, world=world, global_batch_size=global_batch_size, flip=config.flip)
    lookahead = (max(1, config.workers) + 1) * config.prefetch_batches
    return Batches(batches, config=config, world=world, start_cursor=start_cursor, lookahead=lookahead)
