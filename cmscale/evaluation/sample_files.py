"""Reads finished samples: an `.npz` with `arr_0` (the input of ADM's evaluator), or a folder of images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmscale.errors import UserError
from cmscale.evaluation.image_folder import ImageFolder
from cmscale.evaluation.npz import npz_header, npz_rows


@dataclass(frozen=True)
class ImageSet:
    """Images of one size. `read()` yields `count` uint8 arrays [H, W, 3] in order, with one in memory.

    `notes()` gives what a result should say about them, one line each, once they have been read.
    """

    name: str
    count: int
    height: int
    width: int
    read: Callable[[], Iterator[np.ndarray]]
    notes: Callable[[], list[str]] = list


def open_images(path: str | Path) -> ImageSet:
    """Opens an `.npz`, or a folder of images and its subfolders (in the order of their paths).

    Raises:
        UserError: no such file, no images, or another type or shape.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of images")
    if path.suffix != ".npz":
        raise UserError(f"{path}: not finished samples; give an .npz with arr_0, or a folder of images")
    shape, dtype = npz_header(path, "arr_0")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{path}: arr_0 must be uint8 [N, H, W, 3], it is {dtype} {list(shape)}")
    return ImageSet(str(path), shape[0], shape[1], shape[2], lambda: npz_rows(path, "arr_0"))


def batches(images: Iterable[np.ndarray], size: int) -> Iterator[Tensor]:
    """Images [H, W, 3] as uint8 batches [B, 3, H, W] of `size`; the last may be smaller.

    Raises:
        UserError: images of different sizes.
    """
    waiting: list[np.ndarray] = []
    for image in images:
        waiting.append(image)
        if len(waiting) == size:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)


def _stack(images: list[np.ndarray]) -> Tensor:
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise UserError(f"images of different sizes: {sorted(sizes)}; an evaluation needs images of one size")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _open_folder(path: Path) -> ImageSet:
    folder = ImageFolder(path)
    return ImageSet(str(path), folder.count, folder.height, folder.width, folder.read, folder.notes)
