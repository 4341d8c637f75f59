"""Edits image files with a consistency model by one of the zero-shot tasks, and writes a PNG for comparison."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cmscale.consistency import zero_shot
from cmscale.errors import UserError
from cmscale.io import image_tensors
from cmscale.rng import normal_like_samples
from cmscale.source import Source

Task = Literal["inpaint", "colorize", "superres", "stroke", "interpolate", "denoise"]


@dataclass(frozen=True)
class EditRequest:
    """The settings of `cmscale edit`.

    Attributes:
        mask, box: The missing pixels of `inpaint`; see `_missing`.
        factor: The patch size of `superres`.
        sigma: The standard deviation of the noise that `denoise` adds and removes.
        steps: Sampling steps of algorithm 4.
        count: Images of the strip of `interpolate`.
    """

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
    """Writes a PNG with a row per image: the image, the task's input, and the result.

    Raises:
        UserError: images, mask or box do not fit the task, or the model is not an unconditional consistency model.
    """
    method, size = source.config.method, source.config.model.image_size
    if not method.facts.is_consistency_model:
        raise UserError(f"edit: {source.origin} is a diffusion model ({method.kind}); give a consistency model")
    if source.config.model.num_classes is not None:
        raise UserError(f"edit: {source.origin} is class-conditional; give an unconditional model")
    if request.task == "interpolate":
        tiles = _interpolate(source, request, device=device)
        image_tensors.save_png(image_tensors.grid(tiles, columns=len(tiles)), out)
        return
    if not request.images:
        raise UserError(f"edit {request.task}: got no image; give at least one image file")
    originals = torch.stack([image_tensors.load_image(path, size=size) for path in request.images])
    clean = image_tensors.from_uint8(originals).to(device)
    task_input, result = _apply(source, request, clean)
    columns = [originals, *(image_tensors.to_uint8(images.cpu(), nearest=True) for images in (task_input, result))]
    tiles = torch.stack(columns, dim=1).flatten(0, 1)
    image_tensors.save_png(image_tensors.grid(tiles, columns=3), out)


def _apply(source: Source, request: EditRequest, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The task's input and its result, both [B, 3, H, W]."""
    denoise = source.denoiser(clean.device)
    sigmas = zero_shot.STROKE_SIGMAS if request.task == "stroke" else None
    chain = zero_shot.chain(
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
            return torch.where(missing, -1.0, clean), zero_shot.inpaint(chain, clean, missing=missing)
        case "colorize":
            gray = zero_shot.luminance(clean).expand_as(clean)
            return gray, zero_shot.colorize(chain, clean)
        case "superres":
            if clean.shape[-1] % request.factor:
                raise UserError(
                    f"--factor: {request.factor} does not divide the image size {clean.shape[-1]}; choose a divisor"
                )
            coarse = torch.nn.functional.avg_pool2d(clean, request.factor)
            shown = torch.nn.functional.interpolate(coarse, scale_factor=request.factor, mode="nearest")
            return shown, zero_shot.superres(chain, clean, factor=request.factor)
        case "stroke":
            return clean, zero_shot.stroke(chain, clean)
        case "denoise":
            if request.sigma <= 0:
                raise UserError(f"--sigma: got {request.sigma}; give a number above 0")
            noise = normal_like_samples(
                request.seed, range(len(clean)), clean.shape[1:], purpose="noisy", device=clean.device
            )
            noisy = clean + request.sigma * noise
            return noisy, zero_shot.denoise(denoise, noisy, sigma=request.sigma)
    raise AssertionError(request.task)


def _interpolate(source: Source, request: EditRequest, *, device: torch.device) -> torch.Tensor:
    """Images between two samples of the seed, or between two given images, for which it finds the noise first."""
    if len(request.images) not in (0, 2):
        raise UserError(f"edit interpolate: got {len(request.images)} images; give two, or none and --seed")
    denoise, sigma_max = source.denoiser(device), source.config.method.sigma_max
    noises = normal_like_samples(request.seed, range(2), source.image_shape, purpose="start", device=device)
    if request.images:
        size = source.config.model.image_size
        originals = torch.stack([image_tensors.load_image(path, size=size) for path in request.images])
        ends = image_tensors.from_uint8(originals)
        noises = zero_shot.find_noise(denoise, ends.to(device), noises, sigma_max=sigma_max)
    strip = zero_shot.interpolate(denoise, noises[:1], noises[1:], sigma_max=sigma_max, count=request.count)
    return image_tensors.to_uint8(strip.cpu().clamp(-1, 1))


def _missing(request: EditRequest, *, size: int) -> torch.Tensor:
    """The mask of missing pixels, bool [1, 1, size, size]: white in --mask, inside --box, or by default the centre."""
    if request.mask is not None and request.box is not None:
        raise UserError(f"edit inpaint: got --mask {request.mask} and --box {request.box}; give only one of them")
    if request.mask is not None:
        mask = image_tensors.load_image(request.mask, size=size).float().mean(0) > 127
    else:
        mask = torch.zeros(size, size, dtype=torch.bool)
        left, top, right, bottom = _box(request.box or f"{size // 4},{size // 4},{size - size // 4},{size - size // 4}")
        if not (0 <= left < right <= size and 0 <= top < bottom <= size):
            raise UserError(f"--box: got {request.box}; it must lie inside {size} x {size} pixels and not be empty")
        mask[top:bottom, left:right] = True
    if not mask.any():
        raise UserError(f"--mask {request.mask}: has no white pixel; paint the missing pixels white")
    return mask[None, None]


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box: got {text!r}; write LEFT,TOP,RIGHT,BOTTOM in pixels") from None
    return left, top, right, bottom
