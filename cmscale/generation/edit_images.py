"""Owns the edit command: image files in, one of the paper's zero-shot tasks, a side-by-side picture out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cmscale.consistency import zero_shot as edit
from cmscale.errors import UserError
from cmscale.io import pictures
from cmscale.rng import normal_like_samples
from cmscale.source import Source

Task = Literal["inpaint", "colorize", "superres", "stroke", "interpolate", "denoise"]


@dataclass(frozen=True)
class EditRequest:
    """What to do to which images."""

    task: Task
    images: tuple[Path, ...]
    mask: Path | None = None
    box: str | None = None
    factor: int = 8
    sigma: float = 0.5
    steps: int = 40
    count: int = 8
    seed: int = 0


def edit_images(source: Source, request: EditRequest, *, out: Path, device: torch.device) -> None:
    """Writes a PNG, a row for each image: the image, what the task was given of it, the result.

    Raises:
        UserError: images, mask or box that don't fit the task; a model that is no consistency model.
    """
    method, size = source.config.method, source.config.model.image_size
    if not method.facts.is_consistency_model:
        raise UserError(f"edit: {source.origin} is a diffusion model ({method.kind}); it takes consistency models")
    if source.config.model.num_classes is not None:
        raise UserError(f"edit: {source.origin} is class-conditional; editing takes unconditional models")
    if request.task == "interpolate":
        tiles = _interpolate(source, request, device=device)
        pictures.save_png(pictures.grid(tiles, columns=len(tiles)), out)
        return
    if not request.images:
        raise UserError(f"edit {request.task}: needs at least one image file")
    originals = torch.stack([pictures.load_image(path, size=size) for path in request.images])
    clean = pictures.from_uint8(originals).to(device)
    given, result = _apply(source, request, clean)
    columns = [originals, pictures.to_uint8(given.cpu(), nearest=True), pictures.to_uint8(result.cpu(), nearest=True)]
    tiles = torch.stack(columns, dim=1).flatten(0, 1)
    pictures.save_png(pictures.grid(tiles, columns=3), out)


def _apply(source: Source, request: EditRequest, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the task sees of the images, and what it makes of them."""
    denoise = source.denoiser(clean.device)
    sigmas = edit.STROKE_SIGMAS if request.task == "stroke" else None
    chain = edit.chain(
        source.config.method,
        denoise,
        seed=request.seed,
        indices=range(len(clean)),
        steps=request.steps,
        sigmas=sigmas,
    )
    match request.task:
        case "inpaint":
            missing = _missing(request, size=clean.shape[-1]).to(clean.device)
            return torch.where(missing, -1.0, clean), edit.inpaint(chain, clean, missing=missing)
        case "colorize":
            gray = edit.luminance(clean).expand_as(clean)
            return gray, edit.colorize(chain, clean)
        case "superres":
            if clean.shape[-1] % request.factor:
                raise UserError(f"--factor {request.factor}: does not divide the image's {clean.shape[-1]} pixels")
            coarse = torch.nn.functional.avg_pool2d(clean, request.factor)
            shown = torch.nn.functional.interpolate(coarse, scale_factor=request.factor, mode="nearest")
            return shown, edit.superres(chain, clean, factor=request.factor)
        case "stroke":
            return clean, edit.stroke(chain, clean)
        case "denoise":
            if request.sigma <= 0:
                raise UserError(f"--sigma {request.sigma}: must be above 0")
            noise = normal_like_samples(
                request.seed, range(len(clean)), clean.shape[1:], purpose="noisy", device=clean.device
            )
            noisy = clean + request.sigma * noise
            return noisy, edit.denoise(denoise, noisy, sigma=request.sigma)
    raise AssertionError(request.task)


def _interpolate(source: Source, request: EditRequest, *, device: torch.device) -> torch.Tensor:
    """A strip between two seeds' samples, or between two images by way of the noises that give them."""
    if len(request.images) not in (0, 2):
        raise UserError(f"edit interpolate: takes two images, or none and --seed, not {len(request.images)}")
    denoise, sigma_max = source.denoiser(device), source.config.method.sigma_max
    noises = normal_like_samples(request.seed, range(2), source.image_shape, purpose="start", device=device)
    if request.images:
        size = source.config.model.image_size
        ends = pictures.from_uint8(torch.stack([pictures.load_image(path, size=size) for path in request.images]))
        noises = edit.find_noise(denoise, ends.to(device), noises, sigma_max=sigma_max)
    strip = edit.interpolate(denoise, noises[:1], noises[1:], sigma_max=sigma_max, count=request.count)
    return pictures.to_uint8(strip.cpu().clamp(-1, 1))


def _missing(request: EditRequest, *, size: int) -> torch.Tensor:
    """The mask of missing pixels, bool [1, 1, size, size], from a file or a box; the middle where neither is given."""
    if request.mask is not None and request.box is not None:
        raise UserError("edit inpaint: give --mask or --box, not both")
    if request.mask is not None:
        mask = pictures.load_image(request.mask, size=size).float().mean(0) > 127
    else:
        mask = torch.zeros(size, size, dtype=torch.bool)
        left, top, right, bottom = _box(request.box or f"{size // 4},{size // 4},{size - size // 4},{size - size // 4}")
        if not (0 <= left < right <= size and 0 <= top < bottom <= size):
            raise UserError(f"--box {request.box}: must lie inside {size} x {size} and not be empty")
        mask[top:bottom, left:right] = True
    if not mask.any():
        raise UserError(f"--mask {request.mask}: marks nothing; paint what is missing white")
    return mask[None, None]


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box: got {text!r}; write LEFT,TOP,RIGHT,BOTTOM in pixels") from None
    return left, top, right, bottom
