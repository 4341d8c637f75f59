"""Reads one rank's share of a global batch: its samples' pixels, with replacements of those that are bad."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cmscale.data.buffers import Buffers
from cmscale.data.cache import BadFile
from cmscale.data.decode import BadImage, decode_into
from cmscale.data.order import Order, flips
from cmscale.data.samples import Samples
from cmscale.data.workers import with_advice
from cmscale.distributed.world import World
from cmscale.errors import UserError


@dataclass
class RawBatch:
    """What a worker returns: pixels, uint8 [b, H, W, 3], and the samples and shards it replaced, with the reasons."""

    pixels: torch.Tensor
    positions: tuple[int, ...]
    keys: tuple[str, ...]
    flips: torch.Tensor
    bad: dict[str, str]
    bad_shards: dict[str, str]

    def pin_memory(self) -> "RawBatch":
        """Called by the loader's thread for CUDA."""
        self.pixels = self.pixels.pin_memory()
        self.flips = self.flips.pin_memory()
        return self


class RankBatches(Dataset[Any]):
    """Maps a cursor to this rank's share of the global batch that starts there."""

    def __init__(self, samples: Samples, order: Order, *, world: World, global_batch_size: int, flip: bool) -> None:
        self.samples = samples
        self.order = order
        self.world = world
        self.global_batch_size = global_batch_size
        self.flip = flip
        size = samples.manifest.image_size
        self.buffers = Buffers((global_batch_size // world.num_ranks, size, size, 3))

    def ids(self, cursor: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, sample ids and epochs of this rank's share, each [b] int64."""
        positions = self.order.rank_positions(
            cursor,
            global_batch_size=self.global_batch_size,
            rank=self.world.rank,
            num_ranks=self.world.num_ranks,
        )
        ids, epochs, _ = self.order.at(positions)
        return positions, ids, epochs

    def __getitem__(self, cursor: int) -> RawBatch | Exception:
        try:
            return self._read(cursor)
        except (UserError, RuntimeError, ConnectionError) as error:
            return with_advice(error)  # not raised: torch would wrap its one line in a traceback
        finally:
            self.samples.release()  # it may be long until the next batch is wanted

    def _read(self, cursor: int) -> RawBatch:
        positions, ids, epochs = self.ids(cursor)
        pixels = self.buffers.take()
        bad: dict[str, str] = {}
        bad_shards: dict[str, str] = {}
        keys = tuple(
            self._read_into(int(index), row, bad=bad, bad_shards=bad_shards)
            for row, index in zip(pixels.numpy(), ids, strict=True)
        )
        mirrored = flips(self.order, keys, epochs) if self.flip else [False] * len(keys)
        return RawBatch(pixels, tuple(positions.tolist()), keys, torch.tensor(mirrored), bad, bad_shards)

    def _read_into(self, index: int, row: np.ndarray, *, bad: dict[str, str], bad_shards: dict[str, str]) -> str:
        """Decodes a sample, or its replacement, and returns the key.

        An undecodable sample is replaced by the next of its shard, a sample of a bad shard by the one at its place in
        the next good shard: the same replacement on any rank. What was replaced is recorded in `bad`, `bad_shards`.
        """
        shards = self.samples.manifest.shards
        tried = 0
        while True:
            shard = shards[self.samples.shard_of(index)]
            try:
                key, data = self.samples.read(index)
            except BadFile as error:
                bad_shards[shard.name] = str(error)
                if len(bad_shards) == len(shards):
                    raise
                index = self.samples.in_next_shard(index)
                tried = 0
                continue
            try:
                decode_into(data, row, crop=self.samples.cropped_side is not None)
                return key
            except BadImage as error:
                bad[key] = str(error)
                index = self.samples.after(index)
                tried += 1
                if tried == shard.count:
                    raise RuntimeError(
                        f"{self.samples.url}: shard {shard.name} has no image that can be decoded ({error})"
                    ) from None
