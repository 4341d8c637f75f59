"""Stores the progress of an evaluation: features of blocks of samples with fixed index ranges, one file per block.

A block is the unit of work, of progress and of summation. Which rank measured it leaves no trace, so the
result depends on no number of ranks, and a killed evaluation goes on with the blocks that are missing.

    store = BlockStore(folder, identity={...}, num_samples=50_000)      # every rank
    todo = from_main(store.missing())
    for block in todo[world.rank :: world.num_ranks]:                   # block: a range of sample indices
        store.commit(block, extractor(to_uint8(sample(seeds=block))))
    barrier()
    if world.is_main:
        measured = ...  # of store.read()
        store.finish(measured, against=reference.sha256)
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

BLOCK = 128


def blocks(num_samples: int) -> list[range]:
    """The index ranges that `num_samples` samples are measured in; the last may be shorter."""
    return [range(at, min(at + BLOCK, num_samples)) for at in range(0, num_samples, BLOCK)]


class BlockStore:
    """Measured blocks in a folder that every rank sees.

    Args:
        folder: where evaluations keep their progress; this one takes a sub-folder of its own.
        identity: everything that decides the features (weights' hash, sampler, steps, seed, features' label
        and hash):
            another identity never reads these blocks.
        num_samples: how many samples make the evaluation.
    """

    def __init__(self, folder: str | Path, *, identity: Mapping[str, Any], num_samples: int) -> None:
        text = json.dumps({**identity, "num_samples": num_samples}, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.num_samples = num_samples

    def missing(self) -> list[range]:
        """The blocks not yet committed, in their order.

        By one look at the folder: a shared file system may go on saying of a name that it was asked for that there is
        no such file, when another node has made it.
        """
        there = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        return [block for block in blocks(self.num_samples) if self._path(block).name not in there]

    def commit(self, block: range, features: Features) -> None:
        """Stores a block's features: whole, or not at all.

        Raises:
            ValueError: not as many features as the block has samples, or one that is not finite.
        """
        for name, values in features.items():
            if len(values) != len(block):
                raise ValueError(f"{name}: {len(values)} features for the {len(block)} samples of {block}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: not finite in samples {block.start} to {block.stop - 1}")
        replace_durably(self._path(block), save({name: np.ascontiguousarray(v) for name, v in features.items()}))

    def read(self) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        """Every block with its features, in their order.

        Raises:
            FileNotFoundError: a block is missing.
        """
        for block in blocks(self.num_samples):
            yield block, load_file(self._path(block))

    def metrics(self, against: str) -> dict[str, float] | None:
        """What `finish` kept of this evaluation against this reference; None where it is not finished."""
        path = self._metrics_path(against)
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, metrics: Mapping[str, float], *, against: str) -> None:
        """Keeps the metrics against a reference (its hash) in the place of the blocks, which are deleted."""
        replace_durably(self._metrics_path(against), json.dumps(dict(metrics)).encode())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _metrics_path(self, against: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}-against-{against[:16]}.json")

    def _path(self, block: range) -> Path:
        return self.folder / f"block-{block.start:09d}.safetensors"
