"""Makes small deterministic images and data sets for tests, reads them, and damages them."""

import hashlib
import io
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image
from prepare_command import call

from cmscale.config import Data
from cmscale.data import open_batches
from cmscale.distributed.world import World
from cmscale.io.storage import open_storage

FORMATS = ("mds", "webdataset")
COUNT = 23
_ENCODINGS = ("webp", "jpeg", "png")


def smooth_image(number: int, *, width: int = 40, height: int = 32) -> np.ndarray:
    """A smooth image, uint8 [height, width, 3], different for each number."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [(number * 37 + rows * (c + 1) * 3 + columns * 5) % 256 for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encoded(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **({"lossless": True} if kind == "webp" else {}))
    return file.getvalue()


def encoded_images(count: int) -> dict[str, bytes]:
    """Images as in LSUN: 40 hexadecimal characters -> encoded bytes, in three encodings in turn."""
    return {
        hashlib.sha1(str(n).encode()).hexdigest(): encoded(smooth_image(n), _ENCODINGS[n % 3]) for n in range(count)
    }


def write_lmdb(folder: Path, samples: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    environment = lmdb.open(str(folder), map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for key, value in samples.items():
            transaction.put(key.encode(), value)
    environment.close()
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included: relative path -> bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(source: Path, out: str, format: str) -> str:
    """Prepares a data set of JPEGs of 16 px and shards of 4 images from an LMDB. Returns its URL."""
    assert call(f"lsun:{source}", out, "--encoding", "jpeg", format=format) == 0
    return out


def world(rank: int = 0, num_ranks: int = 1) -> World:
    return World(rank=rank, num_ranks=num_ranks, rank_of_node=rank, ranks_per_node=num_ranks)


def data(path: str, **more: object) -> Data:
    return Data.model_validate({"path": path, "workers": 0, "num_canonical_nodes": 3, "shuffle_block": 6, **more})


Sample = tuple[str, bool, bytes]


def collect(config: Data, *, num_ranks: int, batch: int, start: int, steps: int) -> tuple[dict[int, Sample], int]:
    """Samples of `steps` steps on all ranks, by position, and the cursor after them."""
    found: dict[int, Sample] = {}
    cursor = start
    for rank in range(num_ranks):
        batches = open_batches(
            config, world(rank, num_ranks), seed=4, global_batch_size=batch, image_size=16, start_cursor=start
        )
        with closing(batches):
            for _ in range(steps):
                item, cursor = next(batches)
                assert item.images.shape == (batch // num_ranks, 3, 16, 16)
                assert item.images.dtype == torch.uint8
                for at, position in enumerate(item.positions):
                    assert position not in found
                    image = item.images[at].contiguous().numpy().tobytes()
                    found[position] = (item.keys[at], bool(item.flips[at]), image)
    return found, cursor


def spoil(url: str, name: str, how: str) -> None:
    """Damages a file of a data set: `flipped` (a bit), `cut at a member` of a tar, `cut inside`, `missing`."""
    storage = open_storage(url)
    content = storage.read(name)
    if how == "flipped":
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        storage.write(name, bytes(changed))
    elif how == "cut at a member":
        storage.write(name, content[: len(content) // 1024 * 512])
    elif how == "cut inside":
        storage.write(name, content[:-300])
    else:
        storage.delete(name)
