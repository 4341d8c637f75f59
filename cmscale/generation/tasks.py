"""Applies the zero-shot tasks of a consistency model to images that are in memory."""

import torch
from torch import Tensor

from cmscale.consistency import zero_shot
from cmscale.consistency.solver import Denoise
from cmscale.generation.task_settings import TaskSettings
from cmscale.rng import normal_like_samples
from cmscale.source import Source


def add_noise(images: Tensor, settings: TaskSettings) -> Tensor:
    """The input of `denoise`: images [B, 3, H, W] with noise of std `settings.sigma` of the seed."""
    noise = normal_like_samples(
        settings.seed, range(len(images)), images.shape[1:], purpose="noisy", device=images.device
    )
    return images + settings.sigma * noise


def apply_task(
    source: Source, denoise: Denoise, settings: TaskSettings, images: Tensor, missing: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The input of a task as it may be shown, and its result, both [B, 3, H, W].

    Args:
        denoise: The source's network, on the device of the images.
        images: [B, 3, H, W] in [-1, 1]; for `denoise` with noise of std `settings.sigma`.
        missing: The missing pixels of `inpaint`, bool, broadcast to the images.
    """
    sigmas = zero_shot.STROKE_SIGMAS if settings.task == "stroke" else None
    indices = range(len(images))
    chain = zero_shot.chain(
        source.config.method, denoise, seed=settings.seed, indices=indices, steps=settings.steps, sigmas=sigmas
    )
    match settings.task:
        case "inpaint":
            assert missing is not None
            missing = missing.to(images.device)
            return torch.where(missing, -1.0, images), zero_shot.inpaint(chain, images, missing=missing)
        case "colorize":
            grey = zero_shot.luminance(images).expand_as(images)
            return grey, zero_shot.colorize(chain, images)
        case "superres":
            coarse = torch.nn.functional.avg_pool2d(images, settings.factor)
            shown = torch.nn.functional.interpolate(coarse, scale_factor=settings.factor, mode="nearest")
            return shown, zero_shot.superres(chain, images, factor=settings.factor)
        case "stroke":
            return images, zero_shot.stroke(chain, images)
        case "denoise":
            return images, zero_shot.denoise(denoise, images, sigma=settings.sigma)
    raise AssertionError(settings.task)


def evaluations_of_task(settings: TaskSettings, *, of_pictures: bool) -> int:
    """How often a task evaluates the network.

    Args:
        of_pictures: Whether there are pictures; `interpolate` finds the noise of each pair.
    """
    match settings.task:
        case "stroke":
            return len(zero_shot.STROKE_SIGMAS)
        case "denoise":
            return 1
        case "interpolate":
            return 1 + (zero_shot.FINDING_ITERATIONS if of_pictures else 0)
        case "inpaint" | "colorize" | "superres":
            return settings.steps - 1  # at the grid's last time f is the identity


def interpolated(
    source: Source, denoise: Denoise, settings: TaskSettings, *, ends: Tensor | None, device: torch.device
) -> Tensor:
    """`settings.count` images [count, 3, H, W] between two samples of the seed, or between two given images.

    Args:
        ends: Two images [2, 3, H, W] in [-1, 1] on the device, for which the noise is found first; None for samples.
    """
    sigma_max = source.config.method.sigma_max
    noises = normal_like_samples(settings.seed, range(2), source.image_shape, purpose="start", device=device)
    if ends is not None:
        noises = zero_shot.find_noise(denoise, ends, noises, sigma_max=sigma_max)
    return zero_shot.interpolate(denoise, noises[:1], noises[1:], sigma_max=sigma_max, count=settings.count)
