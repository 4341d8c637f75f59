"""Owns how images leave the program for people's eyes: tensors as uint8, grids and strips as PNG files."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.io.image_files import MAX_IMAGE_PIXELS


def to_uint8(images: torch.Tensor, *, nearest: bool = False) -> torch.Tensor:
    """[-1, 1] float [N, 3, H, W] as uint8 of the same shape, as the released code quantises: truncated.

    Args:
        nearest: Rounded instead: what came from uint8 then goes back to the same bytes.

    Raises:
        UserError: a sample is not finite.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        raise UserError(
            f"samples: {bad} of {len(images)} hold NaN or infinity; the weights or the precision are broken"
        )
    scaled = ((images + 1) * 127.5).clamp(0, 255)
    return (scaled.round() if nearest else scaled).to(torch.uint8)


def grid(images: torch.Tensor, *, columns: int | None = None, scale: int | None = None, gap: int = 2) -> Image.Image:
    """uint8 [N, 3, H, W] as one picture, row by row; small images are enlarged by whole pixels to be seen.

    Args:
        columns: As near to a square as it gets, where not given.
        scale: Whole factor; where not given, tiles are brought to some 64 px at the least.
    """
    assert images.dtype == torch.uint8
    number, _, height, width = images.shape
    columns = min(number, columns or int(np.ceil(np.sqrt(number))))
    rows = -(-number // columns)
    factor = scale or max(1, 64 // height)
    tile_height, tile_width = height * factor + gap, width * factor + gap
    canvas = np.full((rows * tile_height + gap, columns * tile_width + gap, 3), 255, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = gap + index // columns * tile_height, gap + index % columns * tile_width
        tile = image.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + height * factor, left : left + width * factor] = tile
    return Image.fromarray(canvas)


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes a picture so that no one ever sees half of it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    replace_durably(path, buffer.getvalue())


def load_image(path: Path, *, size: int) -> torch.Tensor:
    """An image file as uint8 [3, size, size]: shorter side resized (BOX down, Lanczos up), centre cropped.

    Raises:
        UserError: no such file, or no image.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_IMAGE_PIXELS:
                raise UserError(f"{path}: {opened.width} x {opened.height} pixels; at most {MAX_IMAGE_PIXELS} are read")
            picture = opened.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: not an image that can be read ({error})") from None
    ratio = size / min(picture.size)
    target = tuple(max(size, round(side * ratio)) for side in picture.size)
    picture = picture.resize((target[0], target[1]), Image.Resampling.BOX if ratio < 1 else Image.Resampling.LANCZOS)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 as float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1
