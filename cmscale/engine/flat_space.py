"""Numbers the elements of a network's parameters through one flat fp32 space.

The parameters follow each other in model order, without padding. Checkpoints name elements by their places in this
space, so that any world size and ZeRO stage reads what any other wrote.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cmscale.runs.manifests import Parameter


@dataclass(frozen=True)
class Piece:
    """flat[start : start + length] on this rank.

    Attributes:
        views: 1-D fp32 views of the master weights (`master`) and of both moments, by quantity.
    """

    start: int
    views: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        """The number of elements."""
        return self.views["master"].numel()

    def part(self, begin: int, end: int) -> "Piece":
        """The piece's overlap with flat[begin : end]."""
        low, high = max(begin, self.start) - self.start, min(end, self.start + self.length) - self.start
        return Piece(self.start + low, {name: view[low:high] for name, view in self.views.items()})


def number_parameters(module: torch.nn.Module) -> tuple[Parameter, ...]:
    """The flat space of a network. Call it before DeepSpeed partitions the parameters."""
    offset = 0
    found = []
    for name, parameter in module.named_parameters():
        found.append(Parameter(name=name, shape=tuple(parameter.shape), offset=offset))
        offset += parameter.numel()
    return tuple(found)


def count_elements(parameters: tuple[Parameter, ...]) -> int:
    """The length of the flat space."""
    return sum(torch.Size(parameter.shape).numel() for parameter in parameters)


def flatten(tensors: Mapping[str, torch.Tensor], parameters: tuple[Parameter, ...]) -> torch.Tensor:
    """Named tensors as one flat tensor, [num_elements] float32 on the CPU."""
    return torch.cat([tensors[parameter.name].detach().float().cpu().reshape(-1) for parameter in parameters])


def flat_part_size(num_elements: int, *, num_ranks: int, alignment: int) -> int:
    """Elements per rank of the padded flat space, which stages 0 to 2 split into one run per rank."""
    multiple = alignment * num_ranks
    return (num_elements + multiple - 1) // multiple * multiple // num_ranks
