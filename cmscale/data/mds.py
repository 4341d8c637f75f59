"""Owns reading MDS shards, with mosaicml-streaming's own reader; `index.json` is the one that it defines.

StreamingDataset is not used: its barriers spin for ever when a rank dies, its shared memory survives a
SIGKILL and blocks the next start, it serves what lies in its cache unchecked, and its resume state knows no
batch size. Order, cache and resumption are this package's, the same for both formats; StreamingDataset can
read the data sets all the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.manifests import ShardEntry

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
        UserError: the index does not list the manifest's shards.
    """

    def __init__(self, index: Path, shards: Sequence[ShardEntry]) -> None:
        self._objects: list[dict[str, Any]] = json.loads(index.read_bytes())["shards"]
        listed = [(item["raw_data"]["basename"], item["samples"], item["zip_data"]) for item in self._objects]
        if listed != [(shard.name, shard.count, None) for shard in shards]:
            raise UserError(
                f"{index}: does not list the shards of the manifest; run data_prep/verify.py on the data set"
            )
        self._readers: dict[int, Any] = {}

    def read(self, path: Path, shard: int, index: int) -> tuple[str, bytes]:
        """Key and encoded image of a shard's sample. Raises FileNotFoundError when the file was evicted."""
        reader = self._readers.get(shard)
        if reader is None:
            from streaming.base.format import (
                reader_from_json,
            )  # slow to import, and WebDataset readers don't need it

            reader = reader_from_json(str(path.parent), "", self._objects[shard])
            reader.validate(allow_unsafe_types=False)
            self._readers[shard] = reader
        sample = reader[index]
        return sample["key"], sample["image"]
