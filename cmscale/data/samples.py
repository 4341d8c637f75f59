"""Owns a prepared data set as a sequence: the sample with an id, whatever the format and the place."""

import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from cmscale.data.cache import FileCache
from cmscale.data.decode import BadImage, decode
from cmscale.data.formats import mds, webdataset
from cmscale.errors import UserError
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import DatasetManifest, read_dataset_manifest

_EVICTED_AT_MOST = 10
_OPEN_AT_MOST = 256


class Shards(Protocol):
    """What a format offers: the sample `index` of shard number `shard`, whose verified file is open as `file`."""

    def read(self, file: int, shard: int, index: int) -> tuple[str, bytes]: ...


class Samples:
    """Key and encoded image of every sample, by id: ids count through the manifest's shards in order.

    Args:
        url: Folder or `s3://` URL of a data set made by data_prep/prepare.py.
        cache_dir: Root of the shard cache; see `FileCache`.
        cache_gb: Its limit.

    Raises:
        UserError: no data set there, or one that does not match its manifest.
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
        # An evicted file takes its space while it is open: what is held is a small part of the cache.
        largest = max(shard.size for shard in self.manifest.shards)
        self._open_at_most = min(_OPEN_AT_MOST, 1 + self.cache.limit // (8 * largest))
        self._files: dict[int, io.FileIO] = {}

    def _open_shards(self) -> Shards:
        is_mds = self.manifest.format == "mds"
        index_name = mds.INDEX if is_mds else webdataset.INDEX
        if index_name not in {entry.name for entry in self.manifest.files}:
            raise UserError(f"{self.url}: the manifest lists no {index_name}; run data_prep/prepare.py again")
        index = self.cache.path(index_name)
        if is_mds:
            return mds.MDSShards(index, self.manifest.shards)
        return webdataset.TarShards(index, self.manifest.shards, encoding=self.manifest.encoding)

    def __len__(self) -> int:
        return self.manifest.count

    def shard_of(self, index: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect_right(self.starts, index) - 1

    def read(self, index: int) -> tuple[str, bytes]:
        """Key and encoded bytes of a sample.

        Raises:
            BadFile: its shard is missing or damaged; names shard and hash.
        """
        shard = self.shard_of(index)
        return self._shards.read(self._open(shard).fileno(), shard, index - self.starts[shard])

    def _open(self, shard: int) -> io.FileIO:
        """A shard's verified file. The most recently used stay open: eviction by a peer does them no harm."""
        name = self.manifest.shards[shard].name
        file = self._files.pop(shard, None)
        if file is None or not self.cache.touch(name):
            file = self._open_verified(name)
            while len(self._files) >= self._open_at_most:
                self._files.pop(next(iter(self._files))).close()
        self._files[shard] = file
        return file

    def _open_verified(self, name: str) -> io.FileIO:
        for _ in range(_EVICTED_AT_MOST):
            path = self.cache.path(name)
            try:
                return path.open("rb", buffering=0)
            except FileNotFoundError:
                continue  # evicted by a peer between the look and the opening
        raise RuntimeError(f"{path}: evicted as often as it is fetched; raise data.cache_gb")

    def after(self, index: int) -> int:
        """The sample that stands in for an undecodable one: the next in its shard."""
        start = self.starts[self.shard_of(index)]
        count = self.starts[self.shard_of(index) + 1] - start
        return start + (index - start + 1) % count

    def in_next_shard(self, index: int) -> int:
        """The sample that stands in for one of a bad shard: at its place in the next shard, or a place before."""
        shard = self.shard_of(index)
        stand_in = (shard + 1) % len(self.manifest.shards)
        return self.starts[stand_in] + (index - self.starts[shard]) % self.manifest.shards[stand_in].count


def read_images(
    url: str,
    *,
    indices: Iterable[int] | None = None,
    limit: int | None = None,
    cache_dir: str | None = None,
    cache_gb: float = 200.0,
) -> Iterator[tuple[np.ndarray, str]]:
    """Images of a data set in the order of their ids, without shuffling: (uint8 [H, W, 3], key).

    Args:
        indices: Ids to read, in this order; None means all.
        limit: Stops after this many.

    Raises:
        UserError: no data set there, or an id that it doesn't have.
        RuntimeError: a damaged shard or image.
    """
    samples = Samples(url, cache_dir=cache_dir, cache_gb=cache_gb)
    for number, index in enumerate(range(len(samples)) if indices is None else indices):
        if number == limit:
            return
        if not 0 <= index < len(samples):
            raise UserError(f"{samples.url}: no sample {index}, there are {len(samples)}")
        key, data = samples.read(index)
        try:
            image = decode(data)
        except BadImage as error:
            raise RuntimeError(f"{samples.url}: sample {key}: {error}") from error
        yield image, key
