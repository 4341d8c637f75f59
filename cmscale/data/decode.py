"""Owns the way from encoded bytes to pixels: formats by magic bytes, sizes checked before decoding."""

import contextlib
import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 1 << 26  # 8192 x 8192: far above any photograph of a data set, far below what fills the memory
# Pillow warns where `_check_size` refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """Bytes that are no image which can be used; the message says why."""


def sniff(data: bytes) -> str:
    """`jpeg`, `png` or `webp` by the first bytes. Raises BadImage for anything else."""
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
            if colorspace not in ("CMYK", "YCCK"):  # those have no direct way to RGB in libjpeg
                return simplejpeg.decode_jpeg(data)
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            _check_size(*image.size)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"damaged {kind}: {error}") from error


def decode_into(data: bytes, pixels: np.ndarray) -> None:
    """Decodes an image of known size into `pixels`, uint8 [H, W, 3]. Raises BadImage (another size too)."""
    if data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(ValueError):  # damaged, too large, another colour space: looked at below
            if simplejpeg.decode_jpeg(data, buffer=pixels).shape == pixels.shape:
                return
    image = decode(data)
    if image.shape != pixels.shape:
        raise BadImage(f"is {image.shape[1]}x{image.shape[0]}, not {pixels.shape[1]}x{pixels.shape[0]}")
    pixels[:] = image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"claims {width}x{height} pixels, above the limit of {MAX_PIXELS}")
