"""Decodes the images of prepared data sets: JPEG, PNG or WebP, recognised by the first bytes."""

import contextlib

import numpy as np
import simplejpeg

from cmscale.io.pictures import BadImage, decode_picture

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""The formats that data sets hold, and their file name extensions."""


def sniff(data: bytes) -> str:
    """Recognises `jpeg`, `png` or `webp` by the first bytes. Raises BadImage for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadImage(f"neither JPEG, PNG nor WebP (starts with {data[:8].hex() or 'nothing'})")


def decode(data: bytes, *, side: int | None = None) -> np.ndarray:
    """Decodes an image.

    Args:
        side: Crops the centre of an image whose shorter side is this, as data sets of encoding `keep` hold them.

    Returns:
        RGB, uint8 [H, W, 3].

    Raises:
        BadImage: it can't be decoded.
    """
    image = decode_picture(data, exif="ignore", formats=(sniff(data).upper(),)).pixels
    return centre_crop(image, side) if side is not None and min(image.shape[:2]) == side else image


def decode_into(data: bytes, pixels: np.ndarray, *, crop: bool = False) -> None:
    """Decodes an image into `pixels`, uint8 [H, W, 3].

    Args:
        crop: Crops the centre of an image whose shorter side is that of the square `pixels`.

    Raises:
        BadImage: it can't be decoded, or has another size.
    """
    if data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(ValueError):  # damaged, too large, another colour space: handled below
            if simplejpeg.decode_jpeg(data, buffer=pixels).shape == pixels.shape:
                return
    image = decode(data, side=pixels.shape[0] if crop else None)
    if image.shape != pixels.shape:
        raise BadImage(f"is {image.shape[1]}x{image.shape[0]}, not {pixels.shape[1]}x{pixels.shape[0]}")
    pixels[:] = image


def centre_crop(image: np.ndarray, side: int) -> np.ndarray:
    """The centre of an image [H, W, 3], [side, side, 3]."""
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]
