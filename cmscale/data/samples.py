"""Reads the samples of a prepared data set by id, in any format, from a folder or from S3."""

import contextlib
import io
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from cmscale.config import Data
from cmscale.data.cache import FileCache
from cmscale.data.decode import BadImage, decode
from cmscale.data.formats import ShardReader, shard_format
from cmscale.errors import DamagedInput, UserError
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import DatasetManifest, read_dataset_manifest

_MAX_OPEN_FILES = 256


class Samples:
    """Key and encoded image of every sample, by id. Ids count through the manifest's shards in order.

    Args:
        url: Folder or `s3://` URL of a data set made by data_prep/prepare.py.
        cache_dir: Root of the shard cache; see `FileCache`.
        cache_gb: The cache's limit in GB.

    Raises:
        UserError: there is no data set, or it does not match its manifest.
    """

    def __init__(self, url: str, *, cache_dir: str | None = None, cache_gb: float = 200.0) -> None:
        storage = open_storage(url)
        self.url = storage.url
        self.manifest: DatasetManifest = read_dataset_manifest(storage)
        self.starts = list(accumulate((shard.count for shard in self.manifest.shards), initial=0))
        self.cache = FileCache(
            storage,
            {entry.name: entry for entry in (*self.manifest.files, *self.manifest.shards)},
            folder=Path(cache_dir).expanduser() if cache_dir else None,
            name=self.manifest.fingerprint,
            limit=int(cache_gb * 1e9),
        )
        self._shards = self._open_shards()
        # An evicted file occupies its space while it is open: the open files are to be a small part of the cache.
        largest = max(1, *(shard.size for shard in self.manifest.shards))
        self._max_open_files = min(_MAX_OPEN_FILES, 1 + self.cache.limit // (8 * largest))
        self._files: dict[int, io.FileIO] = {}

    def _open_shards(self) -> ShardReader:
        format = shard_format(self.manifest.format)
        if format.index_name not in {entry.name for entry in self.manifest.files}:
            raise UserError(f"{self.url}: the manifest lists no {format.index_name}; run data_prep/prepare.py again")
        with self.cache.open(format.index_name) as index:
            path = self.cache.folder / format.index_name
            shards = format.open_shards(path, self.manifest.shards, encoding=self.manifest.encoding)
            with contextlib.suppress(FileNotFoundError):  # evicted since, after it was read
                if not os.path.samestat(path.stat(), os.fstat(index.fileno())):
                    raise RuntimeError(f"{path}: was replaced while it was read")
        return shards

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def cropped_side(self) -> int | None:
        """The side that images are cropped to when they are decoded; None if they are stored cropped."""
        return self.manifest.image_size if self.manifest.encoding == "keep" else None

    def shard_of(self, index: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect_right(self.starts, index) - 1

    def read(self, index: int) -> tuple[str, bytes]:
        """Key and encoded bytes of a sample.

        Raises:
            BadFile: its shard is missing or damaged; the message names shard and hash.
        """
        shard = self.shard_of(index)
        return self._shards.read(self._open(shard).fileno(), shard, index - self.starts[shard])

    def _open(self, shard: int) -> io.FileIO:
        """A shard's verified file. The most recently used files stay open until `release`."""
        name = self.manifest.shards[shard].name
        file = self._files.pop(shard, None)
        if file is None or not self.cache.touch(name):
            if file is not None:
                file.close()
            if not self.cache.has(name):
                self.release()  # a download, of any process, may need the space of those that are deleted
            file = self.cache.open(name)
            while len(self._files) >= self._max_open_files:
                self._files.pop(next(iter(self._files))).close()
        self._files[shard] = file
        return file

    def release(self) -> None:
        """Closes the shards of a cache that are open: one that the cache has deleted takes its space for so long."""
        while self._files and not self.cache.in_place:
            self._files.popitem()[1].close()

    def after(self, index: int) -> int:
        """The sample that replaces an undecodable one: the next in its shard, cyclically."""
        start = self.starts[self.shard_of(index)]
        count = self.starts[self.shard_of(index) + 1] - start
        return start + (index - start + 1) % count

    def in_next_shard(self, index: int) -> int:
        """The sample that replaces one of a bad shard: at the same place, modulo its size, of the next shard."""
        shard = self.shard_of(index)
        next_shard = (shard + 1) % len(self.manifest.shards)
        return self.starts[next_shard] + (index - self.starts[shard]) % self.manifest.shards[next_shard].count


def open_samples(config: Data) -> Samples:
    """The samples of a config's data set, on this rank.

    Raises:
        UserError: there is no data set, or it does not match its manifest.
    """
    return Samples(config.path, cache_dir=config.cache_dir, cache_gb=config.cache_gb)


def read_images(
    url: str,
    *,
    indices: Iterable[int] | None = None,
    limit: int | None = None,
    cache_dir: str | None = None,
    cache_gb: float = 200.0,
) -> Iterator[tuple[np.ndarray, str]]:
    """Yields images of a data set in the order of their ids, without shuffling, as (uint8 [H, W, 3], key).

    Args:
        indices: Ids to read, in this order; None reads all.
        limit: Maximum number of images.

    Raises:
        UserError: there is no data set, or it has no such id.
        DamagedInput: a shard or an image is damaged.
    """
    samples = Samples(url, cache_dir=cache_dir, cache_gb=cache_gb)
    for number, index in enumerate(range(len(samples)) if indices is None else indices):
        if number == limit:
            return
        if not 0 <= index < len(samples):
            raise UserError(f"{samples.url}: no sample {index}, there are {len(samples)}")
        key, data = samples.read(index)
        try:
            image = decode(data, side=samples.cropped_side)
        except BadImage as error:
            raise DamagedInput(f"{samples.url}: sample {key}: {error}") from error
        yield image, key
