"""Computes LPIPS (arXiv 1801.03924, version 0.1) on VGG16, with maximum or average pooling.

VGG16's convolutions may compute in float16. Measured on photographs, its rounding adds about 2e-7 to a distance: one of
0.004 and more is within 1.2e-4 of float32's, one of 0.0005 within 8e-4, one of 0.00002 within 1.5e-2. With bfloat16
those are 2.7e-3, 2.8e-2 and 0.9, so bfloat16 is not offered. Gradients differ by 1 to 2.5 percent.
"""

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cmscale.errors import UserError
from cmscale.io.reading import reason

# Widths of VGG16's convolutions in five slices with pooling between them; LPIPS uses the output of each slice.
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and standard deviation, for images in [-1, 1].
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distance of images [B, 3, H, W] in [-1, 1] -> [B], float32. Frozen, always in evaluation mode.

    The squared differences of unit-length features are weighted by the linear heads that the `lpips` package ships,
    averaged over positions and summed over layers.

    Args:
        average_pooling: As in the released code of Consistency Models; the `lpips` package uses maximum pooling.
        resize: Resize images to 224 px (bilinear) first, as that code does for images under 256 px.
        dtype: What VGG16's convolutions and pooling compute in: float32 or float16. Distances are always float32.
    """

    def __init__(self, *, average_pooling: bool, resize: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.average_pooling = average_pooling
        self.resize = resize
        channels = [3] + [width for widths in WIDTHS for width in widths]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, dtype=dtype) for before, after in itertools.pairwise(channels)
        )
        for index, head in enumerate(_heads()):
            self.register_buffer(f"head_{index}", head)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":  # noqa: ARG002
        """Stays in evaluation mode, even if a containing module is set to training."""
        return super().train(False)

    def load_features(self, path: Path) -> None:
        """Loads torchvision's VGG16 state dict (`.pth` or `.safetensors`; whole, or only its `features`).

        Raises:
            UserError: there is no such file, or it does not hold VGG16's weights.
        """
        state = _read_state(path)
        weights = [value for key, value in _in_order(state) if value.ndim == 4]
        biases = [value for key, value in _in_order(state) if value.ndim == 1]
        expected = [conv.weight.shape for conv in self.convolutions]
        if [value.shape for value in weights] != expected or len(biases) != len(expected):
            raise UserError(
                f"method.lpips_weights: {path} does not hold the 13 convolutions of torchvision's VGG16; "
                "give its state dict (vgg16-397923af.pth)"
            )
        for conv, weight, bias in zip(self.convolutions, weights, biases, strict=True):
            conv.load_state_dict({"weight": weight, "bias": bias})

    @property
    def _compute_type(self) -> torch.dtype:
        return self.get_parameter("convolutions.0.weight").dtype

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each pair of images [B, 3, H, W] in [-1, 1]: [B]."""
        with without_autocast(a.device):
            if self._compute_type == torch.float16:
                return _ScaledBackward.apply(a, b, self._distance)  # pyright: ignore[reportReturnType]
            return self._distance(a, b)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        distance = torch.zeros(len(a), device=a.device)
        features_a, features_b = self._features(a), self._features(b)
        for index, (x, y) in enumerate(zip(features_a, features_b, strict=True)):
            difference = (_unit(x) - _unit(y)).square()
            head = self.get_buffer(f"head_{index}")
            distance = distance + (difference * head).sum(1).flatten(1).mean(1)
        return distance

    def _features(self, image: Tensor) -> list[Tensor]:
        x = image.float()
        if self.resize:
            x = F.interpolate(x, size=224, mode="bilinear")
        x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        x = x.to(self._compute_type)
        found: list[Tensor] = []
        convolutions = iter(self.convolutions)
        for index, widths in enumerate(WIDTHS):
            if index:
                x = F.avg_pool2d(x, 2) if self.average_pooling else F.max_pool2d(x, 2)
            for _ in widths:
                x = F.relu(next(convolutions)(x))
            found.append(x.float() if x.dtype == torch.float16 else x)
        return found


class _ScaledBackward(torch.autograd.Function):
    """A distance [B] of images whose gradients are computed at once, from a scale at which float16 can hold them.

    The gradients of a mean over a batch of images are too small for float16. Those of each image's own distance are
    computed at a power of two that depends on the image alone, and multiplied by what backward brings in float32.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        images = [x.detach().requires_grad_(needed) for x, needed in zip((a, b), ctx.needs_input_grad, strict=False)]
        wanted = [image for image in images if image.requires_grad]
        with torch.set_grad_enabled(bool(wanted)):
            found = distance(*images)
        if wanted:
            scale = _scale(found.detach(), num_pixels=a[0, 0].numel())
            gradients = iter(torch.autograd.grad(found, wanted, grad_outputs=scale))
            divisor = scale.view(-1, 1, 1, 1)
            ctx.gradients = [next(gradients).float() / divisor if image.requires_grad else None for image in images]
        return found.detach()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        factor = outer[0].view(-1, 1, 1, 1)
        return (*(None if each is None else factor * each for each in ctx.gradients), None)


def _scale(distance: Tensor, *, num_pixels: int) -> Tensor:
    """A power of two [B] for each image: gradients fall with the number of pixels and with the distance's root."""
    return torch.exp2(torch.round(math.log2(num_pixels) - 0.5 * torch.log2(distance.clamp(min=1e-8))))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Computes the block in its tensors' own dtypes; devices without autocast (meta) do so anyway."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _unit(features: Tensor) -> Tensor:
    """Features scaled to unit length over channels."""
    # the gradient of vector_norm is 0, not NaN, where all features are 0
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _heads() -> list[Tensor]:
    """The five linear heads, [1, C, 1, 1] each, that the `lpips` package ships."""
    with resources.as_file(resources.files("lpips") / "weights" / "v0.1" / "vgg.pth") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"] for index in range(len(WIDTHS))]


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise UserError(f"method.lpips_weights: {path}: no such file; give torchvision's VGG16 (vgg16-397923af.pth)")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        items = state.items() if isinstance(state, dict) else ()
        return {key: value for key, value in items if isinstance(value, Tensor)}
    except Exception as error:  # damaged or foreign files raise errors of many types
        raise UserError(
            f"method.lpips_weights: {path} can't be read as weights ({reason(error)}); "
            "give torchvision's VGG16 (vgg16-397923af.pth)"
        ) from error


def _in_order(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The entries `features.N.weight|bias` (or `N.weight|bias`), ordered by layer."""
    layers = []
    for key, value in state.items():
        parts = key.removeprefix("features.").split(".")
        if len(parts) == 2 and parts[0].isdigit():
            layers.append((int(parts[0]), key, value))
    return [(key, value) for _, key, value in sorted(layers, key=lambda entry: entry[:2])]
