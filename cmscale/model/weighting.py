"""Defines the adaptive weighting w(t) of continuous-time training, a small network trained with the UNet.

Its parameters are part of the same module, under `weighting.`, so that they are trained, averaged and checkpointed
with the UNet's. Sampling and export drop them (`without_weighting`).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmscale.config import Model
from cmscale.model import float32
from cmscale.model.unet import UNet, build_network

PREFIX = "weighting."
FREQUENCIES = 8


class Weighting(nn.Module):
    """w(t) = a + b . (cos, sin)(k ln(tan t) / 4), k = 1..8; w is initialised to ln D, so that e^w / D is 1."""

    def __init__(self, num_values: int, *, linear: type[nn.Linear] = float32.Linear) -> None:
        super().__init__()
        self.num_values = num_values
        self.linear = linear(2 * FREQUENCIES, 1)

    @torch.no_grad()
    def initialise(self) -> None:
        """Sets w(t) to one value for all times."""
        self.linear.weight.zero_()
        self.linear.bias.fill_(math.log(self.num_values))

    def forward(self, t: Tensor) -> Tensor:
        """w of times [B], float32."""
        angles = torch.log(torch.tan(t.float()))[:, None] / 4 * torch.arange(1, FREQUENCIES + 1, device=t.device)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        if not isinstance(self.linear, float32.Float32Layer):
            features = features.to(self.linear.weight.dtype)
        return self.linear(features)[:, 0].float()


class WeightedUNet(UNet):
    """The UNet with a weighting w(t)."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.weighting = Weighting(3 * model.image_size**2, linear=self._linear)

    def forward(self, x: Tensor, c_noise: Tensor, *, weight_time: Tensor | None = None, **keywords: Any) -> Any:
        """The output of `UNet.forward`; with `weight_time` [B], the pair of it and w(weight_time) [B]."""
        output = super().forward(x, c_noise, **keywords)
        return output if weight_time is None else (output, self.weighting(weight_time))


def build_weighted_unet(model: Model, *, seed: int = 0) -> WeightedUNet:
    """`build_unet` with a weighting that is initially constant; the UNet's weights are the same."""
    network = build_network(WeightedUNet, model, seed=seed)
    if not network.weighting.linear.weight.is_meta:
        network.weighting.initialise()
    return network


def without_weighting(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without those of the weighting."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}
