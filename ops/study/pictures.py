"""Writes the study's pictures, crops of photographs in pip packages: `pictures.py FOLDER TRAIN HELD_OUT SIDE`."""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

from data_prep.demo import View, in_turn

TRAIN_SEED, HELD_OUT_SEED = 0, 1000
VIEWS = (
    View("coffee", left=(305, 315), top=(193, 202), side=(345, 365)),
    View("flower.jpg", left=(325, 335), top=(197, 205), side=(335, 355)),
    View("retina", left=(699, 711), top=(699, 711), side=(1335, 1375)),
    View("rocket", left=(316, 324), top=(203, 210), side=(401, 416)),
)
"""Photographs of large shapes, nearly the same crop of each: what the fastest methods learn in some thousand images."""


def write_pictures(folder: Path, *, count: int, side: int, seed: int) -> None:
    """Writes `count` PNG files, crops of each photograph in turn; equal seeds give equal pictures."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(in_turn(VIEWS, count=count, side=side, seed=seed)):
        picture.save(folder / f"{number:06d}.png")


def main(folder: Path, train: int, held_out: int, side: int) -> None:
    """Writes both sets into a folder, which is there once it is whole."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    write_pictures(partial / "train", count=train, side=side, seed=TRAIN_SEED)
    write_pictures(partial / "held_out", count=held_out, side=side, seed=HELD_OUT_SEED)
    partial.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
