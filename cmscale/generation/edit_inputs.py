"""Reads the pictures and the mask of an edit, and brings them to the size of the model. Nothing here needs torch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cmscale.errors import UserError
from cmscale.io.pictures import BadImage, Picture, decode_picture
from cmscale.io.reading import read_regular, reading

_WHITE = 128  # and more


def read_picture(path: Path) -> Picture:
    """A picture as it is to be seen: EXIF orientation applied, transparency on white.

    Raises:
        UserError: there is no such file, or it is not an image that can be read.
    """
    with reading(path, "an image"):
        data = read_regular(path)
    try:
        return decode_picture(data, exif="apply")
    except BadImage as error:
        raise UserError(f"{path}: not an image that can be read ({error})") from None


def fit(pixels: np.ndarray, *, size: int) -> np.ndarray:
    """Pixels [H, W, 3] as uint8 [3, size, size]: shorter side resized (BOX down, Lanczos up), centre cropped."""
    fitted = np.asarray(_fitted(Image.fromarray(np.ascontiguousarray(pixels)), size))
    return fitted.transpose(2, 0, 1).copy()


def _fitted(image: Image.Image, size: int) -> Image.Image:
    ratio = size / min(image.size)
    width, height = (max(size, round(side * ratio)) for side in image.size)
    if (width, height) != image.size:
        how = Image.Resampling.BOX if ratio < 1 else Image.Resampling.LANCZOS
        image = image.resize((width, height), how)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def fit_small(pixels: np.ndarray, *, size: int, factor: int, path: Path) -> np.ndarray:
    """A picture for super-resolution as uint8 [3, size, size], of which the means of factor x factor patches are used.

    A picture of less than `size` pixels gives the patches themselves: it is reduced to size / factor pixels if it has
    more, each pixel is repeated factor x factor times, and none is invented.

    Raises:
        UserError: it has less than size / factor pixels.
    """
    shorter, small = min(pixels.shape[:2]), size // factor
    if shorter >= size:
        return fit(pixels, size=size)
    if shorter < small:
        raise UserError(
            f"{path}: its shorter side has {shorter} pixels; --factor {factor} makes {size} of {small}: give a larger "
            f"picture, or a larger --factor"
        )
    return fit(pixels, size=small).repeat(factor, axis=-1).repeat(factor, axis=-2)


@dataclass(frozen=True)
class Mask:
    """The missing pixels of a mask file.

    Attributes:
        missing: bool [H, W].
        rule: Which pixels of the file are taken as missing, in words.
        by_transparency: Whether the transparency of the file decided it.
    """

    missing: np.ndarray
    rule: str = "white pixels are missing"
    by_transparency: bool = True


def read_mask(path: Path) -> Mask:
    """Reads a mask: missing is what is white, or, in a file with transparency, what is transparent.

    White strokes painted on a transparent layer are missing where they are painted: there all opaque pixels are white
    and the transparent ones, under their transparency, are not.

    Raises:
        UserError: it is not an image that can be read, or has black and white opaque pixels and transparent ones too.
    """
    return mask_of(read_picture(path), label=f"--mask {path}")


def mask_of(picture: Picture, *, label: str) -> Mask:
    """The mask that a picture shows: see `read_mask`."""
    white = picture.colours.min(axis=-1) >= _WHITE
    if picture.opacity is None:
        return Mask(white, by_transparency=False)
    opaque = picture.opacity >= 128
    if opaque.all():
        return Mask(white, by_transparency=False)
    if opaque.any():
        if white[opaque].all() and not white[~opaque].all():
            return Mask(opaque, "white strokes on a transparent layer are missing")
        if white[opaque].any() and np.isin(picture.colours[opaque], (0, 255)).all() and not white[opaque].all():
            raise UserError(
                f"{label}: has black, white and transparent pixels, so it is not clear which are missing; save "
                f"it without transparency"
            )
    return Mask(~opaque, "transparent pixels are missing")


def fit_mask(mask: Mask, *, size: int, pictures: list[tuple[Path, tuple[int, int]]], label: str) -> np.ndarray:
    """The mask at the size of the model, bool [1, 1, size, size].

    A mask is drawn on the pictures, and is resized and cropped as they are: a pixel is missing if a part of it is. Or
    it has the size of the model.

    Args:
        pictures: Path and (height, width) of each picture.

    Raises:
        UserError: it has another size, or nothing is missing.
    """
    height, width = mask.missing.shape
    if (height, width) != (size, size):
        for picture, (picture_height, picture_width) in pictures:
            if (height, width) != (picture_height, picture_width):
                raise UserError(
                    f"{label}: {width} x {height} pixels, {picture} has {picture_width} x {picture_height}; give "
                    f"a mask of the picture's size, or of the model's, {size} x {size}"
                )
    share = np.array(_fitted(Image.fromarray(mask.missing.astype(np.float32)), size))
    missing = share > (1e-6 if min(height, width) >= size else 0.5)
    if not missing.any():
        raise UserError(f"{label}: nothing is missing; paint the missing pixels white, or make them transparent")
    return missing[None, None]
