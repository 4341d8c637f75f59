"""Takes the images that Python programs give: files, PIL images, tensors; gives PIL images back."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmscale.errors import UserError
from cmscale.generation.edit_inputs import Mask, fit, fit_mask, fit_small, mask_of, read_mask, read_picture
from cmscale.generation.task_settings import TaskSettings
from cmscale.io import image_tensors
from cmscale.io.fetch import local_file
from cmscale.io.pictures import BadImage, Picture, decode_picture

File = str | os.PathLike[str]
OneImage = File | Image.Image | Tensor
"""A file (also s3://), a PIL image, or a float tensor [3, H, W] in [-1, 1] of the model's size."""
Images = OneImage | Sequence[OneImage]
"""One image or several; a tensor [N, 3, H, W] is several."""

Missing = File | Image.Image | Tensor | np.ndarray
"""Missing pixels: a file or PIL image that is white or transparent there, or a bool array [H, W]."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def several(given: Images) -> tuple[list[OneImage], bool]:
    """The images that are given, and whether they are a sequence: not one image, or one tensor."""
    if isinstance(given, (str, os.PathLike, Image.Image, Tensor)):
        return [given], False
    return list(given), True


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
            images.append(_checked(each if each.ndim == 4 else each[None], name, shape))
            sizes.append((name, (size, size)))
            continue
        pixels = _picture(each, name).pixels
        sizes.append((name, (pixels.shape[0], pixels.shape[1])))
        if settings.task == "superres":
            fitted = fit_small(pixels, size=size, factor=settings.factor, path=name)
        else:
            fitted = fit(pixels, size=size)
        images.append(image_tensors.from_uint8(torch.from_numpy(fitted)[None]))
    if not images:
        raise UserError(f"{settings.task}: got no image; give at least one")
    missing = None
    if settings.task == "inpaint":
        missing = torch.from_numpy(fit_mask(_mask(mask), size=size, pictures=sizes, path=Path("mask")))
    return torch.cat(images), missing, is_single


def _checked(images: Tensor, name: Path, shape: tuple[int, int, int]) -> Tensor:
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise UserError(f"{name}: a tensor {images.dtype} {list(images.shape)}; give float {list(shape)} in [-1, 1]")
    if not bool(torch.isfinite(images).all()):
        raise UserError(f"{name}: holds NaN or infinity; give finite numbers")
    return images.to(torch.float32)


def _picture(given: object, name: Path) -> Picture:
    """The pixels of a file or PIL image; those of an image that was read are those of its file."""
    if isinstance(given, (str, os.PathLike)):
        return read_picture(local_file(os.fspath(given)))
    if not isinstance(given, Image.Image):
        raise UserError(f"{name}: is {type(given).__name__}; give a file, a PIL image or a tensor")
    buffer = io.BytesIO()  # written and read again, so that a PIL image and its file give the same pixels
    given.save(buffer, "PNG" if given.mode in _PNG_MODES else "TIFF", exif=given.getexif())
    try:
        return decode_picture(buffer.getvalue(), exif="apply")
    except BadImage as error:
        raise UserError(f"{name}: not an image that can be used ({error})") from None


def _mask(given: Missing | None) -> Mask:
    """The missing pixels in a file, a PIL image, or a bool array [H, W]."""
    if isinstance(given, (str, os.PathLike)):
        return read_mask(local_file(os.fspath(given)))
    if isinstance(given, Image.Image):
        return mask_of(_picture(given, Path("mask")), path=Path("mask"))
    array = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    if array.dtype != bool or array.ndim != 2:
        raise UserError(f"mask: {array.dtype} {list(array.shape)}; give a file, a PIL image, or a bool array [H, W]")
    return Mask(array)


def as_pil(images: Tensor) -> list[Image.Image]:
    """PIL images of uint8 images [N, 3, H, W]."""
    return [image_tensors.picture(image) for image in images]
