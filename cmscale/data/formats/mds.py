"""Owns reading MDS shards with mosaicml-streaming's own reader, and `index.json` as it defines it.

The reader parses the index, refuses columns that would unpickle, and decodes the samples; the bytes come from files
that stay open, where its own way opens the file anew for every sample. StreamingDataset can read the data sets, and is
not used: its barriers spin for ever when a rank dies, its shared memory survives a SIGKILL and blocks the next start,
it serves what lies in its cache unchecked, and its resume state knows no batch size. Order, cache and resumption are
this package's, the same for both formats.
"""

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.runs.manifests import ShardEntry

INDEX = "index.json"
COLUMNS = {"image": "bytes", "key": "str"}


def shard_index(shards: Sequence[ShardEntry]) -> bytes:
    """The `index.json` of these shards, byte for byte the same for the same shards."""
    columns = sorted(COLUMNS)
    fields = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["sha256"],
        "size_limit": None,
        "column_names": columns,
        "column_encodings": [COLUMNS[name] for name in columns],
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


class MDSShards:
    """Random access to the samples of verified local shards.

    Args:
        index: The local `index.json`.
        shards: The manifest's shards, in its order.

    Raises:
        UserError: the index does not list the manifest's shards, or lists other columns than prepare.py writes.
    """

    def __init__(self, index: Path, shards: Sequence[ShardEntry]) -> None:
        objects: list[dict[str, Any]] = json.loads(index.read_bytes())["shards"]
        listed = [(item["raw_data"]["basename"], item["samples"], item["zip_data"]) for item in objects]
        columns = [dict(zip(item["column_names"], item["column_encodings"], strict=True)) for item in objects]
        if listed != [(shard.name, shard.count, None) for shard in shards] or any(one != COLUMNS for one in columns):
            raise UserError(
                f"{index}: does not list the shards of the manifest; run data_prep/verify.py on the data set"
            )
        # Here: the package takes seconds to import (it imports transformers), and WebDataset's readers don't need it.
        from streaming.base.format import reader_from_json

        self._readers = [reader_from_json(str(index.parent), "", item) for item in objects]
        for reader in self._readers:
            reader.validate(allow_unsafe_types=False)

    def read(self, file: int, shard: int, index: int) -> tuple[str, bytes]:
        """Key and encoded image of a sample; `file` is the shard's descriptor."""
        # A shard: its count, then the offsets of its samples and of their end (uint32).
        begin, end = struct.unpack("<2I", os.pread(file, 8, 4 * (1 + index)))
        sample = self._readers[shard].decode_sample(os.pread(file, end - begin, begin))
        return sample["key"], sample["image"]
