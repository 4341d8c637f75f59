"""Turns the shards of a prepared data set into batches: order, cache, formats, decoding."""

from cmscale.data.batches import Batch, Batches, open_batches, to_device
from cmscale.data.samples import open_samples, read_images

__all__ = ["Batch", "Batches", "open_batches", "open_samples", "read_images", "to_device"]
