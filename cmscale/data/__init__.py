"""Turns the shards of a prepared data set into batches: order, cache, formats, decoding."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmscale.data.batches import Batch, Batches, open_batches, to_device
    from cmscale.data.samples import open_samples, read_images

__all__ = ["Batch", "Batches", "open_batches", "open_samples", "read_images", "to_device"]
_OF_SAMPLES = ("open_samples", "read_images")


def __getattr__(name: str) -> Any:
    """Imports what is asked for: preparing data needs decoding and formats, not torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'cmscale.data' has no attribute {name!r}")
    return getattr(import_module(f"cmscale.data.{'samples' if name in _OF_SAMPLES else 'batches'}"), name)
