"""Writes the study's pictures, crops of photographs in pip packages: `pictures.py FOLDER TRAIN HELD_OUT`."""

import shutil
import sys
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

from data_prep.demo import VIEWS, crops

SIDE = 32
TRAIN_SEED, HELD_OUT_SEED = 0, 1


def write_pictures(folder: Path, *, count: int, seed: int) -> None:
    """Writes `count` PNG files, crops of each photograph in turn; equal seeds give equal pictures."""
    folder.mkdir(parents=True)
    sources = [crops(view, count=-(-count // len(VIEWS)), side=SIDE, seed=seed) for view in VIEWS.values()]
    for number, source in zip(range(count), cycle(sources), strict=False):
        next(source).save(folder / f"{number:06d}.png")


def main(folder: Path, train: int, held_out: int) -> None:
    """Writes both sets into a folder, which is there once it is whole."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    write_pictures(partial / "train", count=train, seed=TRAIN_SEED)
    write_pictures(partial / "held_out", count=held_out, seed=HELD_OUT_SEED)
    partial.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
