"""Reads and writes MDS shards with mosaicml-streaming's own classes, and `index.json` as it defines it.

The package's reader parses the index, refuses columns that would unpickle, and decodes the samples. The bytes come
from files that stay open; the package itself opens the file again for every sample. StreamingDataset can read these
data sets but is not used: its barriers never time out when a rank dies, its shared memory survives a SIGKILL and blocks
the next start, it does not check what its cache holds, and its resume state lacks the batch size. Order, cache and
resumption are those of `cmscale.data`, the same for all formats.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cmscale.data.formats import ShardFormat, Span, WrittenShard
from cmscale.errors import DamagedInput, UserError
from cmscale.io.json_text import parse_json
from cmscale.io.packages import check_tested
from cmscale.io.reading import reading, reason
from cmscale.runs.manifests import ShardEntry

_COLUMNS = {"image": "bytes", "key": "str"}
_MAX_SHARD_BYTES = 1 << 32  # offsets in a shard are 32 bits wide


class MDSFormat(ShardFormat):
    """mosaicml-streaming's format: one binary file per shard, one JSON index."""

    index_name = "index.json"
    index_needs_spans = False

    def shard_name(self, number: int) -> str:
        return f"shard.{number:05d}.mds"

    def write_shard(self, samples: Iterator[tuple[str, bytes]], path: Path, *, encoding: str) -> WrittenShard:  # noqa: ARG002
        from streaming.base.format.mds import MDSWriter  # slow to import

        check_tested("mosaicml-streaming")
        folder = path.with_suffix(".writing")
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        writer = MDSWriter(columns=_COLUMNS, out=str(folder), size_limit=None)
        count = 0
        try:
            for key, image in samples:
                writer.write({"key": key, "image": image})
                count += 1
                if writer.new_shard_size >= _MAX_SHARD_BYTES:
                    raise UserError("--samples-per-shard: a shard would be larger than 4 GiB; use fewer")
            if count:
                # Not `finish`, which writes an index: that is published last, when every shard is there.
                writer.flush_shard()
                (folder / writer.shards[0]["raw_data"]["basename"]).replace(path)
        finally:
            writer.executor.shutdown(wait=True)
            shutil.rmtree(folder, ignore_errors=True)
        return WrittenShard(count)

    def index_bytes(self, shards: Sequence[ShardEntry], spans: Iterable[Span]) -> bytes:  # noqa: ARG002
        columns = sorted(_COLUMNS)
        fields = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": ["sha256"],
            "size_limit": None,
            "column_names": columns,
            "column_encodings": [_COLUMNS[name] for name in columns],
            "column_sizes": [None] * len(columns),
            "zip_data": None,
        }
        objects = [
            {
                **fields,
                "samples": shard.count,
                "raw_data": {"basename": shard.name, "bytes": shard.size, "hashes": {"sha256": shard.sha256}},
            }
            for shard in shards
        ]
        return json.dumps({"version": 2, "shards": objects}, sort_keys=True).encode()

    def open_shards(self, index: Path, shards: Sequence[ShardEntry], *, encoding: str) -> "MDSShards":  # noqa: ARG002
        return MDSShards(index, shards)

    def preload(self) -> None:
        import streaming.base.format.mds  # noqa: F401


class MDSShards:
    """Random access to the samples of verified local shards.

    Args:
        index: The local `index.json`.
        shards: The manifest's shards, in its order.

    Raises:
        UserError: the index does not list the manifest's shards, or lists columns other than prepare.py's.
    """

    def __init__(self, index: Path, shards: Sequence[ShardEntry]) -> None:
        with reading(index, "an index of MDS shards", advice="run data_prep/verify.py on the data set"):
            objects: list[dict[str, Any]] = parse_json(index.read_bytes())["shards"]
            listed = [(item["raw_data"]["basename"], item["samples"], item["zip_data"]) for item in objects]
            columns = [dict(zip(item["column_names"], item["column_encodings"], strict=True)) for item in objects]
        if listed != [(shard.name, shard.count, None) for shard in shards] or any(one != _COLUMNS for one in columns):
            raise UserError(f"{index}: does not list the manifest's shards; run data_prep/verify.py on the data set")
        self._index = index
        from streaming.base.format import reader_from_json  # slow to import, so not for other formats' readers

        check_tested("mosaicml-streaming")
        with reading(index, "an index of MDS shards", advice="run data_prep/verify.py on the data set"):
            self._readers = [reader_from_json(str(index.parent), "", item) for item in objects]
            for reader in self._readers:
                reader.validate(allow_unsafe_types=False)

    def read(self, file: int, shard: int, index: int) -> tuple[str, bytes]:
        """The encoded bytes of a sample."""
        # A shard begins with the number of its samples and the offsets of each of them and of their end (all uint32).
        try:
            begin, end = struct.unpack("<2I", os.pread(file, 8, 4 * (1 + index)))
            sample = self._readers[shard].decode_sample(os.pread(file, end - begin, begin))
            return sample["key"], sample["image"]
        except (struct.error, OSError, ValueError, LookupError, MemoryError) as error:
            raise DamagedInput(
                f"{self._index}: shard {shard} is no MDS shard of its index ({reason(error)})"
            ) from error


FORMAT = MDSFormat()
