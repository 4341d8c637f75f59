"""Writes a small LMDB in LSUN's format from crops of photographs that Python packages ship."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import errno
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import lmdb
import numpy as np
from PIL import Image

from cmscale.commands.ending import guarded, leave
from cmscale.commands.parser import CommandParser, Output, whole_number
from cmscale.commands.use import USED, Use
from cmscale.errors import UserError
from cmscale.io.place import Place

_LARGEST_BYTES = 1 << 40  # of an LMDB; the file is as large as its images


@dataclass(frozen=True)
class View:
    """Square crops of one photograph: ranges of their centres and sides in pixels, drawn from uniformly.

    The photograph is named as in scikit-image, or by its file in scikit-learn.
    """

    photograph: str
    left: tuple[int, int]
    top: tuple[int, int]
    side: tuple[int, int]


VIEWS = {
    "cat": View("chelsea", left=(212, 232), top=(138, 152), side=(240, 280)),
    "astronaut": View("astronaut", left=(212, 230), top=(112, 128), side=(180, 215)),
    "coffee": View("coffee", left=(295, 325), top=(185, 210), side=(330, 380)),
    "flower": View("flower.jpg", left=(315, 345), top=(190, 212), side=(320, 370)),
    "temple": View("china.jpg", left=(198, 226), top=(192, 212), side=(335, 385)),
    "retina": View("retina", left=(685, 725), top=(685, 725), side=(1300, 1411)),
}


def photograph(name: str) -> Image.Image:
    """Loads the photograph of a view from the package that ships it."""
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


def in_turn(views: Iterable[View], *, count: int, side: int, seed: int) -> Iterator[Image.Image]:
    """Yields `count` crops, the next one always of the next view; equal seeds give equal crops."""
    sources = [crops(view, count=count, side=side, seed=seed + number) for number, view in enumerate(views)]
    for number in range(count):
        yield next(sources[number % len(sources)])


def write_lmdb(folder: Path, images: Iterator[Image.Image]) -> int:
    """Writes images in LSUN's format: 40 hexadecimal characters as key, WebP as value. Returns their number."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: the folder is not empty; remove it or name another one")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _write_lmdb(folder, images)
    except BaseException as error:
        for path in folder.iterdir():  # nothing else was in it
            path.unlink()
        if isinstance(error, lmdb.Error):
            raise OSError(errno.EIO, f"can't be written ({error})", str(folder)) from error
        raise


def _write_lmdb(folder: Path, images: Iterator[Image.Image]) -> int:
    count = 0
    with lmdb.open(str(folder), map_size=_LARGEST_BYTES) as database, database.begin(write=True) as transaction:
        for count, image in enumerate(images, start=1):
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=95)
            value = buffer.getvalue()
            # A hash, as in LSUN; of the number too, so that equal crops have different keys.
            transaction.put(hashlib.sha1(b"%d " % count + value).hexdigest().encode(), value)
    return count


def command_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="demo.py", description=__doc__)
    parser.add("folder", use=USED, type=Place, nargs="?", help="folder of the new LMDB, for example demo_train_lmdb")
    parser.add("--picture", use=USED, output=Output((".png",)), help="write one crop as a PNG, to try editing on")
    parser.add(
        "--view", use=USED, choices=sorted(VIEWS), help="crops of this photograph alone (default: of all in turn)"
    )
    parser.add(
        "--samples",
        dest="count",
        use=Use(needs=("folder",)),
        type=whole_number(1),
        default=3000,
        help="number of images in the LMDB (default: 3000)",
    )
    parser.add("--side", use=USED, type=whole_number(1), default=64, help="side of the images, in pixels (default: 64)")
    parser.add("--seed", use=USED, type=whole_number(0), default=0, help="seed of the crops (default: 0)")
    return parser


def run(arguments: list[str]) -> None:
    """Runs the command; raises its errors."""
    options, _ = command_parser().read(arguments)
    if options.folder is None and options.picture is None:
        raise UserError("nothing to write; give the folder of a new LMDB, or --picture FILE.png")
    views = VIEWS.values() if options.view is None else [VIEWS[options.view]]
    images = in_turn(views, count=options.count + 1, side=options.side, seed=options.seed)
    if options.picture is not None:
        buffer = io.BytesIO()
        next(images).save(buffer, "PNG")
        options.picture.write(buffer.getvalue())
    if options.folder is not None:
        folder = options.folder.local("an LMDB")
        print(f"{options.folder}: {write_lmdb(folder, islice(images, options.count))} images")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 1 for a fault, 2 for a user's mistake."""
    return guarded(run, arguments)


if __name__ == "__main__":
    leave(main())
