"""Edits image files with a consistency model by one of the zero-shot tasks, and writes the results."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cmscale.errors import UserError
from cmscale.generation.edit_inputs import fit, fit_mask, fit_small, read_mask, read_picture
from cmscale.generation.tasks import TaskSettings, add_noise, apply_task, check_task, interpolated
from cmscale.io import image_tensors
from cmscale.io.place import Place
from cmscale.source import Source


@dataclass(frozen=True, kw_only=True)
class EditRequest(TaskSettings):
    """The settings of `cmscale edit`.

    Attributes:
        mask, box: The missing pixels of `inpaint`; see `_missing`.
    """

    images: tuple[Path, ...]
    mask: Path | None = None
    box: str | None = None


def edit_images(
    source: Source, request: EditRequest, *, out: Place, strips: Sequence[Place] = (), device: torch.device
) -> list[Place]:
    """Writes the result of each image as a PNG of the model's size, at `out`; see `result_paths`.

    The result of `interpolate` is one PNG with all its pictures in a row.

    Args:
        strips: Files that also get a PNG with a row per image: the image, the task's input, and the result, enlarged;
            of `interpolate` its result.

    Returns:
        The files with results.

    Raises:
        UserError: images, mask or box do not fit the task, or the model is not an unconditional consistency model.
    """
    check_task(source, request)
    if request.task == "interpolate":
        tiles = _interpolate(source, request, device=device)
        picture = image_tensors.png_bytes(image_tensors.grid(tiles, columns=len(tiles)))
        for place in (out, *strips):
            place.write(picture)
        return [out]
    if not request.images:
        raise UserError(f"edit {request.task}: got no image; give at least one image file")
    originals, missing = _inputs(request, size=source.config.model.image_size)
    clean = image_tensors.from_uint8(originals).to(device)
    given = add_noise(clean, request) if request.task == "denoise" else clean
    task_input, result = apply_task(source, source.denoiser(device), request, given, missing)
    results = image_tensors.to_uint8(result.cpu(), nearest=True)
    paths = result_paths(out, len(results))
    for path, image in zip(paths, results, strict=True):
        path.write(image_tensors.png_bytes(image_tensors.picture(image)))
    tiles = torch.stack([originals, image_tensors.to_uint8(task_input.cpu(), nearest=True), results], dim=1)
    for strip in strips:
        strip.write(image_tensors.png_bytes(image_tensors.grid(tiles.flatten(0, 1), columns=3)))
    return paths


def result_paths(out: Place, count: int) -> list[Place]:
    """The files of the results of `count` images: `out`, or if there are several NAME-1.png, NAME-2.png, ..."""
    if count == 1:
        return [out]
    name, dot, ending = out.rpartition(".")
    return [Place(f"{name}-{number}{dot}{ending}") for number in range(1, count + 1)]


def _inputs(request: EditRequest, *, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures at the size of the model, uint8 [B, 3, size, size], and the mask of missing pixels of `inpaint`."""
    pictures = [(path, read_picture(path).pixels) for path in request.images]
    if request.task == "superres":
        fitted = [fit_small(pixels, size=size, factor=request.factor, path=path) for path, pixels in pictures]
    else:
        fitted = [fit(pixels, size=size) for _, pixels in pictures]
    missing = torch.zeros(1, 1, size, size, dtype=torch.bool)
    if request.task == "inpaint":
        sizes = [(path, (pixels.shape[0], pixels.shape[1])) for path, pixels in pictures]
        missing = _missing(request, size=size, pictures=sizes)
    return torch.stack(fitted), missing


def _interpolate(source: Source, request: EditRequest, *, device: torch.device) -> torch.Tensor:
    """The strip of `interpolate`, uint8 [count, 3, H, W]."""
    if len(request.images) not in (0, 2):
        raise UserError(f"edit interpolate: got {len(request.images)} images; give two, or none and --seed")
    ends = None
    if request.images:
        originals, _ = _inputs(request, size=source.config.model.image_size)
        ends = image_tensors.from_uint8(originals).to(device)
    strip = interpolated(source, source.denoiser(device), request, ends=ends, device=device)
    return image_tensors.to_uint8(strip.cpu().clamp(-1, 1))


def _missing(request: EditRequest, *, size: int, pictures: list[tuple[Path, tuple[int, int]]]) -> torch.Tensor:
    """The missing pixels, bool [1, 1, size, size]: those of --mask, inside --box, or by default the centre."""
    if request.mask is not None and request.box is not None:
        raise UserError(f"edit inpaint: got --mask {request.mask} and --box {request.box}; give only one of them")
    if request.mask is not None:
        mask = read_mask(request.mask)
        if mask.by_transparency:
            print(f"--mask {request.mask}: {mask.rule}", file=sys.stderr, flush=True)
        return fit_mask(mask, size=size, pictures=pictures, path=request.mask)
    left, top, right, bottom = _box(request.box or f"{size // 4},{size // 4},{size - size // 4},{size - size // 4}")
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise UserError(f"--box: got {request.box}; it must lie inside {size} x {size} pixels and not be empty")
    missing = torch.zeros(1, 1, size, size, dtype=torch.bool)
    missing[..., top:bottom, left:right] = True
    return missing


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box: got {text!r}; write LEFT,TOP,RIGHT,BOTTOM in pixels") from None
    return left, top, right, bottom
