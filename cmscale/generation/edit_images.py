"""Edits image files with a consistency model by one of the zero-shot tasks, and writes the results."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cmscale.config.sampling_times import check_range
from cmscale.consistency import zero_shot
from cmscale.errors import UserError
from cmscale.generation.edit_inputs import fit, fit_mask, fit_small, read_mask, read_picture
from cmscale.io import image_tensors
from cmscale.io.place import Place
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


def edit_images(
    source: Source, request: EditRequest, *, out: Place, strip: Place | None = None, device: torch.device
) -> list[Place]:
    """Writes the result of each image as a PNG of the model's size, at `out`; see `result_paths`.

    The result of `interpolate` is one PNG with all its pictures in a row.

    Args:
        strip: Also writes a PNG with a row per image: the image, the task's input, and the result, enlarged.

    Returns:
        The files with results.

    Raises:
        UserError: images, mask or box do not fit the task, or the model is not an unconditional consistency model.
    """
    method = source.config.method
    if not method.facts.is_consistency_model:
        raise UserError(f"edit: {source.origin} is a diffusion model ({method.kind}); give a consistency model")
    if source.config.model.num_classes is not None:
        raise UserError(f"edit: {source.origin} is class-conditional; give an unconditional model")
    if request.task == "denoise":
        check_range((request.sigma,), method, label=f"--sigma {request.sigma}")
    if request.task == "interpolate":
        tiles = _interpolate(source, request, device=device)
        out.write(image_tensors.png_bytes(image_tensors.grid(tiles, columns=len(tiles))))
        return [out]
    if not request.images:
        raise UserError(f"edit {request.task}: got no image; give at least one image file")
    originals, missing = _inputs(request, size=source.config.model.image_size)
    clean = image_tensors.from_uint8(originals).to(device)
    task_input, result = _apply(source, request, clean, missing)
    results = image_tensors.to_uint8(result.cpu(), nearest=True)
    paths = result_paths(out, len(results))
    for path, image in zip(paths, results, strict=True):
        path.write(image_tensors.png_bytes(image_tensors.picture(image)))
    if strip is not None:
        tiles = torch.stack([originals, image_tensors.to_uint8(task_input.cpu(), nearest=True), results], dim=1)
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
        if size % request.factor:
            raise UserError(f"--factor: {request.factor} does not divide the image size {size}; choose a divisor")
        fitted = [fit_small(pixels, size=size, factor=request.factor, path=path) for path, pixels in pictures]
    else:
        fitted = [fit(pixels, size=size) for _, pixels in pictures]
    missing = torch.zeros(1, 1, size, size, dtype=torch.bool)
    if request.task == "inpaint":
        sizes = [(path, (pixels.shape[0], pixels.shape[1])) for path, pixels in pictures]
        missing = _missing(request, size=size, pictures=sizes)
    return torch.stack(fitted), missing


def _apply(
    source: Source, request: EditRequest, clean: torch.Tensor, missing: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
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
            missing = missing.to(clean.device)
            return torch.where(missing, -1.0, clean), zero_shot.inpaint(chain, clean, missing=missing)
        case "colorize":
            gray = zero_shot.luminance(clean).expand_as(clean)
            return gray, zero_shot.colorize(chain, clean)
        case "superres":
            coarse = torch.nn.functional.avg_pool2d(clean, request.factor)
            shown = torch.nn.functional.interpolate(coarse, scale_factor=request.factor, mode="nearest")
            return shown, zero_shot.superres(chain, clean, factor=request.factor)
        case "stroke":
            return clean, zero_shot.stroke(chain, clean)
        case "denoise":
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
        originals, _ = _inputs(request, size=source.config.model.image_size)
        ends = image_tensors.from_uint8(originals)
        noises = zero_shot.find_noise(denoise, ends.to(device), noises, sigma_max=sigma_max)
    strip = zero_shot.interpolate(denoise, noises[:1], noises[1:], sigma_max=sigma_max, count=request.count)
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
