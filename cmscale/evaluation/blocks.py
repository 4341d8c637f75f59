"""Stores the features of samples in blocks: fixed ranges of sample indices, one file each.

A block is the unit of work, of progress and of summation. It does not depend on the rank that measured it, so a result
is the same on any number of ranks, and an evaluation that was killed continues with the missing blocks.

    store = BlockStore(folder, identity={...}, num_samples=50_000)  # every rank
    todo = from_main(store.missing())
    for block in todo[world.rank :: world.num_ranks]:                   # block: a range of sample indices
        store.commit(block, extractor(to_uint8(sample(seeds=block))))
    barrier()
    if world.is_main:
        measured = ...  # from store.read()
        store.finish(measured)
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from cmscale.evaluation.features.extractor import Features
from cmscale.io.durable import replace_durably
from cmscale.io.json_text import parse_json

BLOCK = 128


def blocks(num_samples: int) -> list[range]:
    """The index ranges of `num_samples` samples; the last may be shorter."""
    return [range(at, min(at + BLOCK, num_samples)) for at in range(0, num_samples, BLOCK)]


class BlockStore:
    """The blocks of one evaluation, in a folder that every rank sees.

    Args:
        folder: Where evaluations store their blocks; each uses a subfolder.
        identity: Everything that determines the metrics (hash of the weights, sampler, steps, seed, label and hash of
            the feature network, hash of the reference, torch and the device). Evaluations of different identities share
            nothing, so that none continues with another's blocks or removes them.
        num_samples: Number of samples of the evaluation.
    """

    def __init__(self, folder: str | Path, *, identity: Mapping[str, Any], num_samples: int) -> None:
        text = json.dumps({**identity, "num_samples": num_samples}, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.num_samples = num_samples

    def missing(self) -> list[range]:
        """The blocks that are not committed, in order.

        The folder is listed once, as a shared file system may cache the absence of a name that was looked up before
        another node created it.
        """
        committed = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        return [block for block in blocks(self.num_samples) if self._path(block).name not in committed]

    def commit(self, block: range, features: Features) -> None:
        """Stores a block's features; a crash leaves no partial file.

        Raises:
            ValueError: the number of features is not the block's, or a feature is not finite.
        """
        for name, values in features.items():
            if len(values) != len(block):
                raise ValueError(f"{name}: {len(values)} features for the {len(block)} samples of {block}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: not finite in samples {block.start} to {block.stop - 1}")
        replace_durably(self._path(block), save({name: np.ascontiguousarray(v) for name, v in features.items()}))

    def read(self) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        """Yields every block with its features, in order.

        Raises:
            FileNotFoundError: a block is missing.
        """
        for block in blocks(self.num_samples):
            yield block, load_file(self._path(block))

    def metrics(self) -> dict[str, float] | None:
        """The metrics that `finish` stored; None if there are none, or if the file is damaged."""
        try:
            return parse_json(self._metrics_path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Stores the metrics and deletes the blocks."""
        replace_durably(self._metrics_path, json.dumps(dict(metrics)).encode())
        self.discard_blocks()

    def discard_blocks(self) -> None:
        """Deletes the blocks."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _metrics_path(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    def _path(self, block: range) -> Path:
        return self.folder / f"block-{block.start:09d}.safetensors"
