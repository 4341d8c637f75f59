"""Reads finished samples: an `.npz` with `arr_0` (the input of ADM's evaluator), or a folder of images."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmscale.errors import UserError
from cmscale.evaluation.image_folder import ImageFolder
from cmscale.evaluation.image_set import ImageSet
from cmscale.evaluation.npz import npz_header, npz_rows
from cmscale.evaluation.tars import check_sets_below, drawn_set, open_tars
from cmscale.io.fetch import local_file
from cmscale.io.place import Place
from cmscale.io.reading import why_no_file
from cmscale.runs.sample_sets import RECORD


def open_images(path: str | Path) -> ImageSet:
    """Opens an `.npz`, or a folder: of images, also in subfolders (in the order of their paths), or of our tars.

    Raises:
        UserError: no such file, no images, or another type or shape.
    """
    place = Place(path)
    if place.is_remote and not place.lower().endswith(".npz"):
        raise UserError(f"{place}: a folder of images must be on this machine's file systems; give an .npz, or copy it")
    path = local_file(place) if place.is_remote else Path(place)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"{path}: {why_no_file(path, absent='no such file or folder of images')}")
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path}: not finished samples; give an .npz with arr_0, or a folder of images")
    header = npz_header(path, "arr_0")
    shape = header.shape
    if header.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise UserError(f"{path}: arr_0 must be uint8 [N, H, W, 3], it is {header.dtype} {list(shape)[:8]}")
    return ImageSet(str(place), shape[0], shape[1], shape[2], lambda: npz_rows(path, "arr_0"))


def batches(images: Iterable[np.ndarray], size: int) -> Iterator[Tensor]:
    """Images [H, W, 3] as uint8 batches [B, 3, H, W] of `size`; the last may be smaller.

    Raises:
        UserError: images of different sizes.
    """
    waiting: list[np.ndarray] = []
    shape: tuple[int, ...] | None = None
    for image in images:
        if image.shape != (shape := shape or image.shape):
            sizes = " and ".join(f"{height} x {width}" for height, width, *_ in (shape, image.shape))
            raise UserError(f"images of different sizes: {sizes} px (height x width); an evaluation needs one size")
        waiting.append(image)
        if len(waiting) == size:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)


def _stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _open_folder(path: Path) -> ImageSet:
    drawn = drawn_set(path)
    if drawn is not None and drawn.format == "tar":
        return open_tars(path, drawn)
    if drawn is None:
        check_sets_below(path)
    folder = ImageFolder(path)
    if drawn is not None and folder.count != drawn.count:
        raise UserError(f"{path}: holds {folder.count} images, its {RECORD} says {drawn.count}; draw the samples again")
    encoding = ", ".join(sorted(name.lower() for name in folder.formats))
    return ImageSet(str(path), folder.count, folder.height, folder.width, folder.read, folder.notes, encoding)
