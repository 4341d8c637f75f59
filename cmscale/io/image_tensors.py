"""Converts image tensors to uint8 and back, arranges them in grids, and writes image files."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cmscale.errors import UserError
from cmscale.io.durable import replace_durably

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


def picture(image: torch.Tensor) -> Image.Image:
    """One image, uint8 [3, H, W], without enlargement."""
    assert image.dtype == torch.uint8
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


def png_bytes(image: Image.Image) -> bytes:
    """The image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, *, within: Path | None = None) -> None:
    """Writes a PNG file, `within` as for `replace_durably`; readers see the old file or the whole new one."""
    replace_durably(path, png_bytes(image), within=within)
