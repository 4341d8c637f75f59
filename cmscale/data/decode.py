"""Decodes images: the format is recognised by magic bytes, the size is checked before decoding."""

import contextlib
import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from cmscale.io.image_files import MAX_IMAGE_PIXELS

# Pillow would warn about what `_check_size` refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """Raised for bytes that are not a usable image; the message says why."""


def sniff(data: bytes) -> str:
    """Recognises `jpeg`, `png` or `webp` by the first bytes. Raises BadImage for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadImage(f"neither JPEG, PNG nor WebP (starts with {data[:8].hex() or 'nothing'})")


def decode(data: bytes) -> np.ndarray:
    """Decodes an image. Returns RGB, uint8 [H, W, 3]. Raises BadImage."""
    kind = sniff(data)
    try:
        if kind == "jpeg":
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(int(width), int(height))
            if colorspace not in ("CMYK", "YCCK"):  # libjpeg does not convert these to RGB
                return simplejpeg.decode_jpeg(data)
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            _check_size(*image.size)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"damaged {kind}: {error}") from error


def decode_into(data: bytes, pixels: np.ndarray) -> None:
    """Decodes an image of known size into `pixels`, uint8 [H, W, 3]. Raises BadImage, also for another size."""
    if data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(ValueError):  # damaged, too large, another colour space: handled below
            if simplejpeg.decode_jpeg(data, buffer=pixels).shape == pixels.shape:
                return
    image = decode(data)
    if image.shape != pixels.shape:
        raise BadImage(f"is {image.shape[1]}x{image.shape[0]}, not {pixels.shape[1]}x{pixels.shape[0]}")
    pixels[:] = image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise BadImage(f"claims {width}x{height} pixels, above the limit of {MAX_IMAGE_PIXELS}")
