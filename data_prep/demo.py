"""Writes a small LMDB in LSUN's format from crops of a photograph that a Python package ships."""

import argparse
import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

from cmscale.errors import UserError


@dataclass(frozen=True)
class View:
    """Square crops of one photograph: ranges of their centres and sides in pixels, drawn from uniformly."""

    photograph: str
    left: tuple[int, int]
    top: tuple[int, int]
    side: tuple[int, int]


VIEWS = {
    "cat": View("chelsea", left=(210, 254), top=(135, 165), side=(220, 290)),
    "astronaut": View("astronaut", left=(196, 256), top=(95, 145), side=(150, 230)),
    "coffee": View("coffee", left=(260, 340), top=(180, 220), side=(280, 390)),
    "flower": View("flower.jpg", left=(290, 370), top=(180, 220), side=(300, 420)),
}


def photograph(name: str) -> Image.Image:
    """Loads a photograph from scikit-image or, if its name ends in `.jpg`, from scikit-learn."""
    try:
        if name.endswith(".jpg"):
            from sklearn.datasets import load_sample_image

            return Image.fromarray(load_sample_image(name))
        from skimage import data

        return Image.fromarray(getattr(data, name)())
    except ImportError as error:
        raise UserError(f"{name}: {error.name} is not installed; pip install 'cmscale[demo]'") from None


def crops(view: View, *, count: int, side: int, seed: int) -> Iterator[Image.Image]:
    """Yields `count` crops of `side` x `side` pixels; equal seeds give equal crops."""
    image = photograph(view.photograph)
    random = np.random.default_rng(seed)
    for _ in range(count):
        size = min(int(random.integers(view.side[0], view.side[1] + 1)), *image.size)
        x = round(float(np.clip(random.uniform(*view.left) - size / 2, 0, image.width - size)))
        y = round(float(np.clip(random.uniform(*view.top) - size / 2, 0, image.height - size)))
        yield image.crop((x, y, x + size, y + size)).resize((side, side), Image.Resampling.BOX)


def write_lmdb(folder: Path, images: Iterator[Image.Image]) -> int:
    """Writes images in LSUN's format: 40 hexadecimal characters as key, WebP as value. Returns their number."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: the folder is not empty; remove it or name another one")
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with lmdb.open(str(folder), map_size=1 << 32) as database, database.begin(write=True) as transaction:
        for count, image in enumerate(images, start=1):
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=95)
            value = buffer.getvalue()
            # A hash, as in LSUN; of the number too, so that equal crops have different keys.
            transaction.put(hashlib.sha1(b"%d " % count + value).hexdigest().encode(), value)
    return count


def main() -> int:
    """Runs the command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of the new LMDB, for example demo_train_lmdb")
    parser.add_argument("--picture", type=Path, help="write one crop as a PNG, to try editing on")
    parser.add_argument("--view", choices=sorted(VIEWS), default="flower", help="photograph (default: flower)")
    parser.add_argument("--count", type=int, default=3000, help="number of images (default: 3000)")
    parser.add_argument("--side", type=int, default=64, help="side of the images, in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the crops (default: 0)")
    arguments = parser.parse_args()
    try:
        images = crops(VIEWS[arguments.view], count=arguments.count, side=arguments.side, seed=arguments.seed)
        if arguments.picture is not None:
            next(images).save(arguments.picture)
        if arguments.folder is not None:
            print(f"{arguments.folder}: {write_lmdb(arguments.folder, images)} images")
    except UserError as error:
        print(f"data_prep/demo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
