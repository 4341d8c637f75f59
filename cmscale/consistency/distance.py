"""Computes the distance d(x, y) between two batches of images that a loss minimises."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor

from cmscale.config import MethodSection
from cmscale.config.methods.base import DistanceSettings
from cmscale.consistency import lpips
from cmscale.io.published import VGG16, published_file

Distance = Callable[[Tensor, Tensor], Tensor]
"""(a, b), both [B, C, H, W] in [-1, 1] -> [B]."""


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over the image, as in the released code; the paper's ||a - b||_1 is a sum."""
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over the image, as in the released code; the paper's ||a - b||_2^2 is a sum."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, *, c: float) -> Tensor:
    """sqrt(||a - b||_2^2 + c^2) - c over the whole image; iCT, equation 7. With c = 0, the Euclidean distance."""
    square = (a - b).square().flatten(1).sum(1)
    if c == 0:  # its gradient is 0 where a = b, not the 0 / 0 of the square root
        return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
    # equal to sqrt(s + c^2) - c, without its cancellation at small s
    return square / ((square + c**2).sqrt() + c)


def default_huber_c(image_size: int, channels: int = 3) -> float:
    """c = 0.00054 sqrt(D), with D values per image; iCT, section 3.3."""
    return 0.00054 * math.sqrt(channels * image_size**2)


def lpips_network(settings: DistanceSettings, image_size: int) -> lpips.LPIPS:
    """LPIPS as a method's loss uses it, without VGG16's weights."""
    return lpips.LPIPS(
        average_pooling=settings.lpips_pooling == "average",
        resize=image_size < 256,
        dtype=torch.float16 if settings.lpips_precision == "fp16" else torch.float32,
    )


def build_distance(
    method: MethodSection, image_size: int, *, lpips_weights: Path | None = None, device: torch.device | str = "cpu"
) -> Distance | None:
    """The distance of a method's loss; None if its loss uses none of these.

    Args:
        lpips_weights: File with VGG16's weights for LPIPS; None downloads them to torch hub's cache if they are not
            there.

    Raises:
        UserError: the weights for LPIPS are missing or are not VGG16's.
    """
    settings = method.distance_settings
    if settings is None:
        return None
    match settings.name:
        case "lpips":
            network = lpips_network(settings, image_size)
            network.load_features(lpips_weights if lpips_weights is not None else published_file(VGG16))
            return network.to(device)
        case "l1":
            return l1
        case "l2":
            return l2
        case "pseudo_huber":
            c = default_huber_c(image_size) if settings.huber_c is None else settings.huber_c
            return partial(pseudo_huber, c=c)
    assert_never(settings.name)
