"""Owns reading WebDataset shards at random: an index of the samples, webdataset's grouping.

Shards are opened by path only, never by URL: webdataset's own opener runs a shell for `pipe:` and rewrites
URLs from the environment. Only the data set's own member is looked at; nothing is decoded by its extension.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from webdataset.tariterators import group_by_keys

from cmscale.errors import UserError
from cmscale.runs.manifests import ShardEntry

INDEX = "index.npy"
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def member_key(key: str) -> str:
    """A key as a tar member's name without extension: webdataset splits names at the first dot."""
    return quote(key, safe="/").replace(".", "%2E")


def index_bytes(spans: Iterable[tuple[int, int]]) -> bytes:
    """The index file: [begin, end) of each sample's members within its shard, [N, 2] uint64 as npy."""
    file = io.BytesIO()
    np.save(file, np.array(list(spans), dtype="<u8").reshape(-1, 2), allow_pickle=False)
    return file.getvalue()


class TarShards:
    """Random access to the samples of verified local shards.

    Args:
        index: The local index file.
        shards: The manifest's shards, in its order.
        encoding: Of the images, which decides the member's extension.

    Raises:
        UserError: the index is not one of these shards.
    """

    def __init__(self, index: Path, shards: Sequence[ShardEntry], *, encoding: str) -> None:
        self._extension = EXTENSIONS[encoding]
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])
        self._spans = np.asarray(np.load(index, mmap_mode="r", allow_pickle=False))  # a memmap is slow to index
        if self._spans.shape != (self._starts[-1], 2):
            raise UserError(
                f"{index}: does not list the samples of the manifest; run data_prep/verify.py on the data set"
            )

    def read(self, file: int, shard: int, index: int) -> tuple[str, bytes]:
        """Key and encoded image of a sample; `file` is the shard's descriptor."""
        begin, end = self._spans[self._starts[shard] + index].tolist()
        block = os.pread(file, end - begin, begin)
        sample = next(iter(group_by_keys(_members(block))))
        return unquote(sample["__key__"]), sample[self._extension]


def _members(block: bytes) -> Iterator[dict[str, Any]]:
    """The files in a piece of a tar (POSIX ustar, names of at most 100 bytes: what prepare.py writes), as webdataset's
    own iterator gives them at a tenth of the speed."""
    at = 0
    while at < len(block):
        name = block[at : at + 100].rstrip(b"\0").decode("ascii")
        size = int(block[at + 124 : at + 135], 8)
        at += 512
        yield {"fname": name, "data": block[at : at + size], "__url__": ""}
        at += -(-size // 512) * 512
