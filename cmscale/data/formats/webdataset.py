"""Reads and writes WebDataset shards (tar files), with an index that gives random access.

Shards are opened by path, never by URL: webdataset's own opener runs a shell for `pipe:` and rewrites URLs according to
the environment. Only the image member of a sample is read; nothing is decoded by its file name extension.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from webdataset.tariterators import group_by_keys
from webdataset.writer import TarWriter

from cmscale.data.decode import EXTENSIONS, sniff
from cmscale.data.formats import ShardFormat, Span, WrittenShard, escaped_key
from cmscale.errors import DamagedInput, UserError
from cmscale.io.reading import reading, reason
from cmscale.runs.manifests import ShardEntry


class WebDatasetFormat(ShardFormat):
    """WebDataset's format: one uncompressed tar per shard, and an index of the samples, [N, 2] uint64 as npy."""

    index_name = "index.npy"
    index_needs_spans = True

    def shard_name(self, number: int) -> str:
        return f"shard-{number:05d}.tar"

    def write_shard(self, samples: Iterator[tuple[str, bytes]], path: Path, *, encoding: str) -> WrittenShard:
        spans = []
        # Written in memory first: closing a tar stream that failed (on a full disk) raises again.
        memory = io.BytesIO()
        writer = TarWriter(memory, user="", group="", mtime=0, encoder=False)
        for key, image in samples:
            begin = writer.tarstream.offset
            writer.write({"__key__": escaped_key(key), EXTENSIONS[_format(image, encoding)]: image})
            spans.append((begin, writer.tarstream.offset))
        writer.close()
        path.write_bytes(memory.getbuffer())
        return WrittenShard(len(spans), tuple(spans))

    def index_bytes(self, shards: Sequence[ShardEntry], spans: Iterable[Span]) -> bytes:  # noqa: ARG002
        file = io.BytesIO()
        np.save(file, np.array(list(spans), dtype="<u8").reshape(-1, 2), allow_pickle=False)
        return file.getvalue()

    def open_shards(self, index: Path, shards: Sequence[ShardEntry], *, encoding: str) -> "TarShards":
        return TarShards(index, shards, extension=EXTENSIONS.get(encoding))


def _format(image: bytes, encoding: str) -> str:
    """The format of an image in a data set of an encoding: in one of `keep` each image has its own."""
    return sniff(image) if encoding == "keep" else encoding


class TarShards:
    """Random access to the samples of verified local shards.

    Args:
        index: The local index file.
        shards: The manifest's shards, in its order.
        extension: File name extension of the image members; None if they differ.

    Raises:
        UserError: the index does not list as many samples as the manifest.
    """

    def __init__(self, index: Path, shards: Sequence[ShardEntry], *, extension: str | None) -> None:
        self._extensions = tuple(EXTENSIONS.values()) if extension is None else (extension,)
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])
        with reading(index, "an index of tars", advice="run data_prep/verify.py on the data set"):
            spans = np.load(index, mmap_mode="r", allow_pickle=False)
            self._spans = np.asarray(spans)  # a memmap is slow to index
        self._index = index
        if self._spans.shape != (self._starts[-1], 2) or self._spans.dtype != np.dtype("<u8"):
            raise UserError(f"{index}: does not list the manifest's samples; run data_prep/verify.py on the data set")

    def read(self, file: int, shard: int, index: int) -> tuple[str, bytes]:
        """The encoded bytes of a sample."""
        begin, end = self._spans[self._starts[shard] + index].tolist()
        try:
            block = os.pread(file, end - begin, begin)
            sample = next(iter(group_by_keys(_members(block))))
            return unquote(sample["__key__"]), next(sample[each] for each in self._extensions if each in sample)
        except (OSError, ValueError, LookupError, OverflowError, MemoryError, StopIteration) as error:
            raise DamagedInput(f"{self._index}: shard {shard} is no tar of its index ({reason(error)})") from error


def _members(block: bytes) -> Iterator[dict[str, Any]]:
    """The files in a piece of a tar, as webdataset's own iterator yields them but ten times as fast.

    Reads what `write_shard` writes: POSIX ustar with names of at most 100 bytes.
    """
    at = 0
    while at < len(block):
        name = block[at : at + 100].rstrip(b"\0").decode("ascii")
        size = int(block[at + 124 : at + 135], 8)
        if size < 0:
            raise ValueError(f"a member of {size} bytes")
        at += 512
        yield {"fname": name, "data": block[at : at + size], "__url__": ""}
        at += -(-size // 512) * 512


FORMAT = WebDatasetFormat()
