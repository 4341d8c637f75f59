"""Converts image tensors to uint8 and back, arranges them in grids, and reads and writes image files."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.io.image_files import MAX_IMAGE_PIXELS

_SMALLEST_TILE = 64  # px


def to_uint8(images: torch.Tensor, *, nearest: bool = False) -> torch.Tensor:
    """Quantises float [N, 3, H, W] in [-1, 1] to uint8 of the same shape.

    Args:
        nearest: Rounds, so that what came from uint8 gives the same bytes again. The default truncates, as the
            code that produced the published results does (`clip((x + 1) * 127.5, 0, 255)` as uint8).

    Raises:
        UserError: an image holds NaN or infinity.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        raise UserError(
            f"samples: {bad} of {len(images)} hold NaN or infinity; check the weights, or try engine.precision=fp32"
        )
    scaled = ((images + 1) * 127.5).clamp(0, 255)
    return (scaled.round() if nearest else scaled).to(torch.uint8)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """Maps uint8 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def grid(images: torch.Tensor, *, columns: int | None = None, scale: int | None = None, gap: int = 2) -> Image.Image:
    """Arranges uint8 [N, 3, H, W] as tiles of one image, row by row.

    Args:
        columns: Tiles per row; by default the grid is as near to a square as possible.
        scale: Whole factor by which tiles are enlarged; by default small ones are brought to about 64 px.
        gap: White pixels between tiles and around them.
    """
    assert images.dtype == torch.uint8
    number, _, height, width = images.shape
    columns = min(number, columns or int(np.ceil(np.sqrt(number))))
    rows = -(-number // columns)
    factor = scale or max(1, _SMALLEST_TILE // height)
    tile_height, tile_width = height * factor + gap, width * factor + gap
    canvas = np.full((rows * tile_height + gap, columns * tile_width + gap, 3), 255, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = gap + index // columns * tile_height, gap + index % columns * tile_width
        tile = image.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + height * factor, left : left + width * factor] = tile
    return Image.fromarray(canvas)


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG file; readers see the old file or the whole new one."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    replace_durably(path, buffer.getvalue())


def load_image(path: Path, *, size: int) -> torch.Tensor:
    """Reads an image file as uint8 [3, size, size]: shorter side resized (BOX down, Lanczos up), centre cropped.

    Raises:
        UserError: there is no such file, it is not an image, or it has too many pixels.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_IMAGE_PIXELS:
                raise UserError(f"{path}: {opened.width} x {opened.height} pixels; at most {MAX_IMAGE_PIXELS} are read")
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: not an image that can be read ({error})") from None
    ratio = size / min(image.size)
    target = tuple(max(size, round(side * ratio)) for side in image.size)
    image = image.resize((target[0], target[1]), Image.Resampling.BOX if ratio < 1 else Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
