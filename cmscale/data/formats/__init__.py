"""Defines what a shard format is and finds the formats: every module in this package is one.

A module `NAME.py` that defines `FORMAT`, a `ShardFormat`, adds the format NAME to prepare.py, to verify.py and to all
readers. Nothing else lists formats. Samples have the same keys in every format (`sample_key`), so that order and
mirroring do not depend on it.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from cmscale.errors import UserError
from cmscale.io.reading import utf8
from cmscale.runs.manifests import ShardEntry, dataset_formats

Span = tuple[int, int]
_LONGEST_KEY = 90  # what a ustar header certainly holds, extension included


class ShardReader(Protocol):
    """Random access to the samples of a data set's shards, given as open local files."""

    def read(self, file: int, shard: int, index: int) -> tuple[str, bytes]:
        """Returns key and encoded image of sample `index` of shard number `shard`; `file` is its descriptor."""
        ...


@dataclass(frozen=True)
class WrittenShard:
    """What a format reports about a shard that it wrote.

    Attributes:
        count: Number of samples.
        spans: [begin, end) of each sample in the file, in bytes; empty for formats whose index does not need them.
    """

    count: int
    spans: tuple[Span, ...] = ()


class ShardFormat(ABC):
    """One shard format: file names, contents, index and reader.

    Attributes:
        index_name: File name of the data set's index.
        index_needs_spans: Whether `index_bytes` uses the spans, so that only the images can restore a lost index.
    """

    index_name: str
    index_needs_spans: bool

    @abstractmethod
    def shard_name(self, number: int) -> str:
        """File name of shard `number`."""

    @abstractmethod
    def write_shard(self, samples: Iterator[tuple[str, bytes]], path: Path, *, encoding: str) -> WrittenShard:
        """Writes (key, encoded image) pairs to `path`. Equal samples give equal bytes.

        Writes nothing, or a file that the caller ignores, where there are no samples.
        """

    @abstractmethod
    def index_bytes(self, shards: Sequence[ShardEntry], spans: Iterable[Span]) -> bytes:
        """Contents of the index of these shards, whose samples have these spans, in order."""

    @abstractmethod
    def open_shards(self, index: Path, shards: Sequence[ShardEntry], *, encoding: str) -> ShardReader:
        """Opens the shards for reading.

        Args:
            index: The verified local index file.
            shards: The manifest's shards, in its order.
            encoding: The images' encoding.

        Raises:
            UserError: the index does not belong to these shards.
        """

    def preload(self) -> None:  # noqa: B027
        """Imports what `write_shard` needs where that takes long: called once before any shard is made."""


def shard_format(name: str) -> ShardFormat:
    """The format of this name.

    Raises:
        UserError: there is no such format.
    """
    if name not in dataset_formats():
        raise UserError(f"{name!r} is not a data set format; formats are {', '.join(dataset_formats())}")
    found = getattr(import_module(f"{__name__}.{name}"), "FORMAT", None)
    if not isinstance(found, ShardFormat):
        raise TypeError(f"{__name__}.{name} must define FORMAT, a ShardFormat")
    return found


def escaped_key(key: str) -> str:
    """A key as a tar member's name without extension: percent-encoded, dots too, as readers split at the first dot."""
    return quote(key, safe="/").replace(".", "%2E")


def sample_key(key: str) -> str:
    """The key of the sample that is made of a source's image `key`: the same, or its SHA-1 where it is too long."""
    if len(escaped_key(utf8(key))) <= _LONGEST_KEY:
        return utf8(key)
    return hashlib.sha1(key.encode("utf-8", "surrogateescape")).hexdigest()
