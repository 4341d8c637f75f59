"""The distance d(x, y) between two batches of images that a consistency loss minimises."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor

from cmscale.config import MethodSection
from cmscale.consistency import lpips

Distance = Callable[[Tensor, Tensor], Tensor]
"""(a, b), both [B, C, H, W] in [-1, 1] -> [B]."""


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over the image, as the released code; the paper's ||a - b||_1 is a sum."""
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over the image, as the released code; the paper's ||a - b||_2^2 is a sum."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, *, c: float) -> Tensor:
    """sqrt(||a - b||_2^2 + c^2) - c over the whole image; iCT, equation 7."""
    square = (a - b).square().flatten(1).sum(1)
    # The same number as sqrt(s + c^2) - c, without the cancellation at small s.
    return square / ((square + c**2).sqrt() + c)


def default_huber_c(image_size: int, channels: int = 3) -> float:
    """c = 0.00054 sqrt(D), D the number of values of an image; iCT, section 3.3."""
    return 0.00054 * math.sqrt(channels * image_size**2)


def build_distance(
    method: MethodSection, image_size: int, *, lpips_weights: Path | None = None, device: torch.device | str = "cpu"
) -> Distance | None:
    """The distance of a method's loss; None for a method whose loss has its own.

    Args:
        lpips_weights: VGG16's file for LPIPS; None takes torchvision's copy in torch hub's cache, which
            `lpips.download_vgg` fills (call it on one rank per node).

    Raises:
        UserError: LPIPS's weights are missing or are not VGG16's.
    """
    settings = method.distance_settings
    if settings is None:
        return None
    match settings.name:
        case "lpips":
            network = lpips.LPIPS(average_pooling=settings.lpips_pooling == "average", resize=image_size < 256)
            network.load_features(lpips_weights if lpips_weights is not None else lpips.download_vgg())
            return network.to(device)
        case "l1":
            return l1
        case "l2":
            return l2
        case "pseudo_huber":
            return partial(pseudo_huber, c=settings.huber_c or default_huber_c(image_size))
    assert_never(settings.name)
