"""Layers that compute in float32 in a network of bf16 or fp16 parameters, as the released code's do.

ZeRO trains parameters of one dtype, so the parameters of these layers are rounded like all others. The engine gives the
layers the float32 masters from which they were rounded (`set_values`), and the layers compute with those; gradients
reach the rounded parameters. Without such values they compute in float32 with the rounded ones.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class Float32Layer(nn.Module):
    """A layer whose forward reads its parameters through `value`."""

    _values: dict[str, Tensor] | None = None  # no buffers: a checkpoint has them as masters

    def value(self, name: str) -> Tensor:
        """The parameter in float32, with the gradient of the parameter."""
        rounded = getattr(self, name).float()
        exact = None if self._values is None else self._values.get(name)
        if exact is None:
            return rounded
        return rounded + (exact - rounded).detach()  # exactly `exact`: their difference has no rounding

    def set_value(self, name: str, value: Tensor) -> None:
        """Sets what a parameter counts for in forward passes."""
        self._values = {**(self._values or {}), name: value}


class Linear(Float32Layer, nn.Linear):
    """nn.Linear in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.value("weight"), self.value("bias"))


class Conv2d(Float32Layer, nn.Conv2d):
    """nn.Conv2d in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input.float(), self.value("weight"), self.value("bias"))


def value_names(network: nn.Module) -> tuple[str, ...]:
    """The parameters that float32 layers read, in the order of `named_parameters`."""
    layers = {name for name, module in network.named_modules() if isinstance(module, Float32Layer)}
    return tuple(name for name, _ in network.named_parameters() if name.rpartition(".")[0] in layers)


def set_values(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives the float32 layers the values of their parameters, by the names of `value_names`."""
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        layer = network.get_submodule(path)
        assert isinstance(layer, Float32Layer)
        layer.set_value(leaf, value)
