"""Shows DeepSpeed a network's parameters as one, so that its work for each parameter is done once."""

from typing import Any

import torch
from torch import nn


class OneTensor(nn.Module):
    """A network whose only parameter is `flat`, in the order of the flat space; its layers compute with views of it.

    DeepSpeed hooks, copies, averages, measures and checks every parameter's gradient on its own, which takes longer
    than a small layer itself. The views' gradients are put together by one concatenation at the end of the backward
    pass, so that nothing is reduced before, and all gradients are in memory at once.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        parameters = dict(network.named_parameters())
        self.flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
        self.network = network
        self._sizes = [parameter.numel() for parameter in parameters.values()]
        self._places: list[tuple[dict[str, Any], str, torch.Size]] = []
        self._shown = (0, self.flat.dtype)
        for name, parameter in parameters.items():
            path, _, leaf = name.rpartition(".")
            layer = network.get_submodule(path)
            delattr(layer, leaf)
            self._places.append((vars(layer), leaf, parameter.shape))
        self._show()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Without gradients the views of an earlier pass serve; its backward pass may still have to recompute with them.
        if torch.is_grad_enabled() or self._shown != (self.flat.data_ptr(), self.flat.dtype):
            self._show()
        return self.network(*args, **kwargs)

    def _show(self) -> None:
        """Gives each layer its views, as plain attributes."""
        for part, (attributes, leaf, shape) in zip(self.flat.split(self._sizes), self._places, strict=True):
            attributes[leaf] = part.view(shape)
        self._shown = (self.flat.data_ptr(), self.flat.dtype)
