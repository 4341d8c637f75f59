"""Owns the adaptive weighting w(t) of continuous-time training: a small network of its own beside the UNet.

Its parameters stand in the same module, under `weighting.`, so that they are trained, averaged and checkpointed with
the rest; whoever reads weights to sample or export drops them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmscale.config import Model
from cmscale.model.unet import UNet, built

PREFIX = "weighting."
FREQUENCIES = 8


class Weighting(nn.Module):
    """w(t) = a + b . (cos, sin)(k ln(tan t) / 4), k = 1..8; begins as ln D, where e^w / D is 1."""

    def __init__(self, num_values: int) -> None:
        super().__init__()
        self.num_values = num_values
        self.linear = nn.Linear(2 * FREQUENCIES, 1)

    @torch.no_grad()
    def initialise(self) -> None:
        self.linear.weight.zero_()
        self.linear.bias.fill_(math.log(self.num_values))

    def forward(self, t: Tensor) -> Tensor:
        """w of times [B], float32."""
        angles = torch.log(torch.tan(t.float()))[:, None] / 4 * torch.arange(1, FREQUENCIES + 1, device=t.device)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.linear(features.to(self.linear.weight.dtype))[:, 0].float()


class WeightedUNet(UNet):
    """The UNet, which also gives w(t) where it is asked for it."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.weighting = Weighting(3 * model.image_size**2)

    def forward(self, x: Tensor, c_noise: Tensor, *, weight_time: Tensor | None = None, **keywords: Any) -> Any:
        """`UNet.forward`; with `weight_time` [B] the pair of it and w."""
        output = super().forward(x, c_noise, **keywords)
        return output if weight_time is None else (output, self.weighting(weight_time))


def build_weighted_unet(model: Model, *, seed: int = 0) -> WeightedUNet:
    """`build_unet`, with a weighting that is constant at first. The UNet's weights are the same."""
    network = built(WeightedUNet, model, seed=seed)
    if not network.weighting.linear.weight.is_meta:
        network.weighting.initialise()
    return network


def without_weighting(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's own parameters among a checkpoint's."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}
