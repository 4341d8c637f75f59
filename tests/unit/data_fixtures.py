"""Owns the small sources of images that the data tests prepare: deterministic, a few kilobytes."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

FORMATS = ("webp", "jpeg", "png")


def picture(number: int, *, width: int = 40, height: int = 32) -> np.ndarray:
    """A smooth image that no other number has, uint8 [height, width, 3]."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [(number * 37 + rows * (c + 1) * 3 + columns * 5) % 256 for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encoded(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **({"lossless": True} if kind == "webp" else {}))
    return file.getvalue()


def pictures(count: int) -> dict[str, bytes]:
    """LSUN-like: 40 hexadecimal characters -> encoded bytes, the three formats in turn."""
    return {hashlib.sha1(str(n).encode()).hexdigest(): encoded(picture(n), FORMATS[n % 3]) for n in range(count)}


def write_lmdb(folder: Path, samples: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    environment = lmdb.open(str(folder), map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for key, value in samples.items():
            transaction.put(key.encode(), value)
    environment.close()
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
