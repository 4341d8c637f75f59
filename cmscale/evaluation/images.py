"""Owns finished images as they lie on disk: an `.npz` with `arr_0` (as ADM's evaluator reads it) or a
folder."""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmscale.errors import UserError
from cmscale.io.image_files import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS

SUFFIXES = (*IMAGE_SUFFIXES, ".bmp")


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read one at a time: `read()` yields uint8 [H, W, 3] arrays, `count` of them, in
    order."""

    name: str
    count: int
    height: int
    width: int
    read: Callable[[], Iterator[np.ndarray]]


def open_images(path: str | Path) -> ImageSet:
    """Opens an `.npz` or a folder of images (sub-folders too; in the order of their paths).

    Raises:
        UserError: nothing there, no images, not uint8 RGB, more than one size.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of images")
    if path.suffix != ".npz":
        raise UserError(f"{path}: finished images come as an .npz with arr_0 or as a folder of images")
    shape, dtype = npz_header(path, "arr_0")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{path}: arr_0 must be uint8 [N, H, W, 3], it is {dtype} {list(shape)}")
    return ImageSet(str(path), shape[0], shape[1], shape[2], lambda: npz_rows(path, "arr_0"))


def batches(images: Iterable[np.ndarray], size: int) -> Iterator[Tensor]:
    """Images [H, W, 3] as uint8 batches [B, 3, H, W] of `size`; the last may be smaller."""
    held: list[np.ndarray] = []
    for image in images:
        held.append(image)
        if len(held) == size:
            yield _stack(held)
            held = []
    if held:
        yield _stack(held)


def _stack(images: list[np.ndarray]) -> Tensor:
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise UserError(f"images of different sizes: {sorted(sizes)}; an evaluation takes one size")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def npz_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in an `.npz`, without reading it. Raises UserError: no such array, not an
    `.npz`."""
    with _member(path, name) as file:
        return _header(file, path)


def npz_rows(path: Path, name: str) -> Iterator[np.ndarray]:
    """The rows of an array in an `.npz`, one at a time: memory holds one row, compressed or not."""
    with _member(path, name) as file:
        shape, dtype = _header(file, path)
        size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        for _ in range(shape[0]):
            row = file.read(size)
            if len(row) != size:
                raise UserError(f"{path}: {name} is cut short")
            yield np.frombuffer(row, dtype).reshape(shape[1:]).copy()


def _member(path: Path, name: str) -> Any:
    try:
        return zipfile.ZipFile(path).open(f"{name}.npy")  # which keeps the archive's file open
    except KeyError:
        raise UserError(f"{path}: holds no {name}") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not an .npz file ({error})") from None


def _header(file: Any, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if fortran_order or dtype.hasobject:
        raise UserError(f"{path}: arrays of Python objects or in Fortran order are not read")
    return shape, dtype


def _open_folder(path: Path) -> ImageSet:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{path}: no images there ({', '.join(SUFFIXES)})")
    height, width, _ = _read_file(files[0]).shape
    return ImageSet(str(path), len(files), height, width, lambda: (_read_file(file) for file in files))


def _read_file(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UserError(f"{file}: {image.width} x {image.height} pixels; at most {MAX_IMAGE_PIXELS} are read")
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{file}: not an image ({error})") from None
