"""Decodes picture files to RGB: the one decoder of `prepare.py`, evaluations, references and `cmscale edit`.

Its rules:

* 16 bits per channel, grey or colour: the high byte, so that 0 to 65535 becomes 0 to 255.
* 32 bits per channel: PGM and PPM, which state their range, as 16 bits; others, and floating point, are refused.
* Transparency: composited on white.
* CMYK: converted to RGB without its colour profile. No profile changes the values of other pictures either.
* Several frames or pages: the first.
* EXIF orientation: applied or ignored, as the caller says. The orientation of a TIFF, which is part of that format,
  is always applied.

`Picture.decisions` says which of them a picture needed.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from cmscale.io.image_files import MAX_IMAGE_PIXELS, Exif, image_formats

HIGH_BYTE = "more than 8 bits per channel, reduced to 8"
ON_WHITE = "transparency, composited on white"
FIRST_FRAME = "several frames or pages, the first taken"
FROM_CMYK = "CMYK, converted to RGB without a colour profile"
TURNED = "EXIF orientation, applied"
NOT_TURNED = "EXIF orientation, ignored"

_DEEP = re.compile(r";16[BLNS]")  # Pillow's names of layouts that it reduces to 8 bits itself
_LOSSY = ("JPEG", "MPO", "GIF", "AVIF")  # a GIF has 256 colours
_WHITE_IS_ZERO, _BITS_PER_SAMPLE = 262, 258  # tags of TIFF


class BadImage(Exception):
    """Raised for bytes that are not a usable image; the message says why."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        pixels: RGB, uint8 [H, W, 3].
        opacity: uint8 [H, W], 255 where a pixel is opaque; None if all are. `pixels` are composited already.
        colours: `pixels` as they are stored, not composited; the same array if all are opaque.
        format: Pillow's name of the file's format, such as `JPEG`.
        is_lossy: Whether the format, as far as it is known, stores other values than it was given.
        decisions: The rules that changed something, in words.
    """

    pixels: np.ndarray
    opacity: np.ndarray | None
    colours: np.ndarray
    format: str
    is_lossy: bool
    decisions: tuple[str, ...]


def decode_picture(data: bytes, *, exif: Exif, formats: tuple[str, ...] | None = None) -> Picture:
    """Decodes a picture by the rules of this module.

    Args:
        exif: What happens to an EXIF orientation.
        formats: Pillow's names of the formats that are accepted; None for all of `image_formats`.

    Raises:
        BadImage: it is no picture of these formats, damaged, too large, or has pixels without a stated range.
    """
    formats = formats or _likely_formats(data)
    with _opened(io.BytesIO(data), formats, start=data[:8]) as image:
        _check_size(*image.size)
        return _decoded(image, data, exif=exif)


@contextmanager
def _opened(file: BinaryIO, formats: tuple[str, ...], *, start: bytes) -> Iterator[Image.Image]:
    """A picture whose header is read. The block's errors become BadImage: Pillow's plug-ins raise all kinds."""
    try:
        with Image.open(file, formats=formats) as image:
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from None
    except Image.UnidentifiedImageError:
        if len(formats) != 1:
            raise BadImage(f"no picture in a format that is read (starts with {start.hex() or 'nothing'})") from None
        raise BadImage(f"damaged {formats[0].lower()}: its header can't be read") from None
    except Exception as error:
        kind = f"damaged {formats[0].lower()}" if len(formats) == 1 else "damaged"
        raise BadImage(f"{kind}: {error}") from error


def _likely_formats(data: bytes) -> tuple[str, ...]:
    """The format that the first bytes state, as loading all of Pillow's plug-ins takes a while; else all."""
    if data[:3] == b"\xff\xd8\xff":
        return ("JPEG",)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return ("PNG",)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ("WEBP",)
    return image_formats()


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise BadImage(f"claims {width}x{height} pixels, above the limit of {MAX_IMAGE_PIXELS}")
    if not width or not height:
        raise BadImage(f"is empty, {width}x{height} pixels")


def _decoded(image: Image.Image, data: bytes, *, exif: Exif) -> Picture:
    decisions = []
    if getattr(image, "is_animated", False):
        decisions.append(FIRST_FRAME)
    deep = image.mode.startswith(("I", "F")) or any(_DEEP.search(str(tile[3])) for tile in getattr(image, "tile", ()))
    if deep:
        decisions.append(HIGH_BYTE)
    opacity = None
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        colours = simplejpeg.decode_jpeg(data)
    else:
        image.load()
        _check_size(*image.size)
        if image.mode in ("CMYK", "YCCK"):
            decisions.append(FROM_CMYK)
        colours, opacity = _channels(image)
    if opacity is not None:
        decisions.append(ON_WHITE)
    orientation = _orientation(image)
    if orientation != 1:
        decisions.append(TURNED if exif == "apply" else NOT_TURNED)
        if exif == "apply":
            colours = _turned(colours, orientation)
            opacity = None if opacity is None else _turned(opacity, orientation)
    pixels = colours if opacity is None else _on_white(colours, opacity)
    return Picture(pixels, opacity, colours, image.format or "", _is_lossy(image, data), tuple(decisions))


def _is_lossy(image: Image.Image, data: bytes) -> bool:
    if image.format != "WEBP":
        return image.format in _LOSSY
    at = 12
    while at + 8 <= len(data):  # the chunks of a RIFF file: name, size, contents padded to an even length
        if data[at : at + 4] in (b"VP8 ", b"ANMF"):
            return True
        at += 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
    return False


def _channels(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB [H, W, 3] and opacity [H, W] of a loaded image; no opacity if all pixels are opaque."""
    if image.mode.startswith(("I", "F")):
        return _grey_of_many_bits(image)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB")), None
    straight = image.convert("LA") if image.mode == "La" else image
    channels = np.asarray(straight.convert("RGBA"))
    colours, opacity = np.ascontiguousarray(channels[..., :3]), np.ascontiguousarray(channels[..., 3])
    return colours, opacity if (opacity < 255).any() else None


def _grey_of_many_bits(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is not stated; convert it to 8 or 16 bits per channel")
    if image.mode == "I" and image.format != "PPM":  # PPM files state their range, which Pillow scales to 65535
        raise BadImage("32-bit or signed pixels, whose range is not stated; convert it to 8 or 16 bits per channel")
    grey = (values >> (4 if tags.get(_BITS_PER_SAMPLE) == (12,) else 8)).astype(np.uint8)
    if tags.get(_WHITE_IS_ZERO) == 0:
        grey = 255 - grey
    hidden = image.info.get("transparency")
    opacity = np.where(values == hidden, 0, 255).astype(np.uint8) if isinstance(hidden, int) else None
    colours = np.repeat(grey[..., None], 3, axis=-1)
    return colours, opacity if opacity is not None and (opacity < 255).any() else None


def _on_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    alpha = opacity[..., None].astype(np.uint32)
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or the EXIF data is damaged, as viewers take it."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return found if found in range(1, 9) else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, ...] as they are to be seen."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


@dataclass(frozen=True)
class Header:
    """What a picture file says about itself: Pillow's name of its format, and its size in pixels before any turning."""

    format: str
    width: int
    height: int


def read_header(path: Path) -> Header:
    """The header of a picture file, whose pixels are not decoded.

    Raises:
        BadImage: it is no picture in a format that is read, or too large.
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        start = file.read(12)
        file.seek(0)
        with _opened(file, _likely_formats(start), start=start[:8]) as image:
            header = Header(image.format or "", *image.size)
            _check_size(header.width, header.height)
    return header
