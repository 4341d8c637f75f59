"""Takes the images that Python programs give: files, PIL images, tensors; gives PIL images back."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmscale.errors import UserError
from cmscale.generation.edit_inputs import Mask, fit, fit_mask, fit_small, mask_of, read_mask, read_picture
from cmscale.generation.task_settings import TaskSettings
from cmscale.io import image_tensors
from cmscale.io.fetch import local_file
from cmscale.io.pictures import BadImage, Picture, decode_picture
from cmscale.io.place import Place
from cmscale.io.reading import reading

File = str | os.PathLike[str]
OneImage = File | Image.Image | NDArray[Any] | Tensor
"""A file (also s3://), a PIL image, an array uint8 [H, W, 3], or a float tensor [3, H, W] in [-1, 1], which has the
model's size."""
Images = OneImage | Sequence[OneImage]
"""One image or several; a tensor [N, 3, H, W] and an array [N, H, W, 3] are several."""

Missing = File | Image.Image | Tensor | NDArray[Any]
"""Missing pixels: a file or PIL image that is white or transparent there, or a bool array [H, W] or [1, ..., H, W]."""

_LARGEST = 2.0  # of a pixel: estimates that are not clamped leave [-1, 1] a little
_NO_SEQUENCES = (str, bytes, Set, Mapping, io.IOBase, Image.Image, np.ndarray, Tensor)
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def several(given: Images) -> tuple[list[OneImage], bool]:
    """The images that are given, and whether they are a sequence: not one image, or one tensor."""
    if isinstance(given, np.ndarray) and given.ndim == 4:
        return list(given), True
    if isinstance(given, Iterable) and not isinstance(given, _NO_SEQUENCES):
        return list(given), True
    return [given], False


def inputs_of(
    settings: TaskSettings, given: Sequence[OneImage], *, mask: Missing | None, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None, bool]:
    """The images float [N, 3, H, W] of a task, the missing pixels of `inpaint`, and whether it is one image.

    Args:
        shape: Of an image of the model.

    Raises:
        UserError: an image or the mask can't be used.
    """
    size, is_single, images, sizes = shape[-1], True, [], []
    for number, each in enumerate(given):
        name = Path(os.fspath(each) if isinstance(each, (str, os.PathLike)) else f"image {number}")
        if isinstance(each, Tensor):
            is_single = each.ndim == 3
            images.append(_checked(each, name, shape, task=settings.task))
            sizes.append((name, (size, size)))
            continue
        pixels = _picture(each, name).pixels
        sizes.append((name, (pixels.shape[0], pixels.shape[1])))
        if settings.task == "superres":
            fitted = fit_small(pixels, size=size, factor=settings.factor, path=name)
        else:
            fitted = fit(pixels, size=size)
        images.append(image_tensors.from_uint8(torch.from_numpy(fitted)[None]))
    if not sum(map(len, images)):
        raise UserError(f"{settings.task}: got no image; give at least one")
    missing = None
    if settings.task == "inpaint":
        missing = torch.from_numpy(fit_mask(_mask(mask), size=size, pictures=sizes, label="mask"))
    return torch.cat(images), missing, is_single


def _checked(images: Tensor, name: Path, shape: tuple[int, int, int], *, task: str) -> Tensor:
    if images.ndim not in (3, 4) or tuple(images.shape[-3:]) != shape or not images.is_floating_point():
        raise UserError(f"{name}: a tensor {images.dtype} {list(images.shape)}; give float {list(shape)} in [-1, 1]")
    images = images.detach()
    if not bool(torch.isfinite(images).all()):
        raise UserError(f"{name}: holds NaN or infinity; give finite numbers")
    if task != "denoise" and images.numel() and float(images.abs().max()) > _LARGEST:
        least, most = images.aminmax()
        raise UserError(f"{name}: values from {least:.4g} to {most:.4g}; give values in [-1, 1]")
    return (images if images.ndim == 4 else images[None]).to(torch.float32)


def _picture(given: object, name: Path) -> Picture:
    """The pixels of a file, PIL image or array; those of an image that was read are those of its file."""
    if isinstance(given, (str, os.PathLike)):
        return read_picture(local_file(str(Place(os.fspath(given)))))
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim not in (2, 3) or given.shape[2:] not in ((), (3,), (4,)):
            raise UserError(
                f"{name}: an array {given.dtype} {list(given.shape)}; give uint8 [H, W, 3], "
                "or a float tensor [3, H, W] in [-1, 1]"
            )
        given = Image.fromarray(given) if given.size else Image.new("RGB", (0, 0))
    if not isinstance(given, Image.Image):
        raise UserError(f"{name}: is {type(given).__name__}; give a file, a PIL image, an array or a tensor")
    if 0 in given.size:
        raise UserError(f"{name}: has {given.width} x {given.height} pixels; give an image that has some")
    with reading(name, "a PIL image that can be used", advice="give another"):
        given.load()  # a file that PIL has only opened
    buffer = io.BytesIO()  # written and read again, so that a PIL image and its file give the same pixels
    try:
        given.save(buffer, "PNG" if given.mode in _PNG_MODES else "TIFF", exif=_exif(given))
    except OSError:
        raise UserError(f"{name}: a PIL image of mode {given.mode}; convert it to RGB") from None
    try:
        return decode_picture(buffer.getvalue(), exif="apply")
    except BadImage as error:
        raise UserError(f"{name}: not an image that can be used ({error})") from None


def _exif(image: Image.Image) -> Image.Exif:
    """The EXIF data of an image; none where they are damaged, as in its file."""
    try:
        return image.getexif()
    except Exception:  # Pillow raises all kinds
        return Image.Exif()


def _mask(given: Missing | None) -> Mask:
    """The missing pixels in a file, a PIL image, or a bool array [H, W]."""
    if isinstance(given, (str, os.PathLike)):
        return read_mask(local_file(str(Place(os.fspath(given)))))
    if isinstance(given, Image.Image):
        return mask_of(_picture(given, Path("mask")), label="mask")
    if given is None:
        raise UserError("mask: got None; give a file, a PIL image, or a bool array [H, W] that is true where to fill")
    array = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    while array.dtype == bool and array.ndim > 2 and len(array) == 1:  # [1, 1, H, W], as tensors of masks often are
        array = array[0]
    if array.dtype != bool or array.ndim != 2:
        raise UserError(
            f"mask: {array.dtype} {list(array.shape)}; give a file, a PIL image, or a bool array [H, W], "
            "such as levels > 127"
        )
    return Mask(array)


def as_pil(images: Tensor) -> list[Image.Image]:
    """PIL images of uint8 images [N, 3, H, W]."""
    return [image_tensors.picture(image) for image in images]
