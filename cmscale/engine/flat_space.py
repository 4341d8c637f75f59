"""Numbers the elements of a network's parameters through one flat fp32 space, and says which rank holds which.

The parameters follow each other in model order, without padding. Checkpoints name elements by their places in this
space, so that any world size and ZeRO stage reads what any other wrote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cmscale.runs.manifests import Parameter, Segment


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


def own_range(parameter: Parameter, rank: int, *, num_ranks: int) -> tuple[int, int]:
    """The elements of a parameter that a rank holds in stage 3: [begin, end) within the parameter."""
    numel = torch.Size(parameter.shape).numel()
    share = -(-numel // num_ranks)
    return min(rank * share, numel), min((rank + 1) * share, numel)


@dataclass(frozen=True)
class SegmentsByRank(Sequence[tuple[Segment, ...]]):
    """`segments_of_rank` of every rank, computed when asked for: those of thousands of ranks would fill gigabytes."""

    parameters: tuple[Parameter, ...]
    num_ranks: int
    zero_stage: int
    part_size: int

    def __len__(self) -> int:
        return self.num_ranks

    def __getitem__(self, rank: Any) -> Any:
        if isinstance(rank, slice):
            return tuple(self[each] for each in range(*rank.indices(self.num_ranks)))
        if not -self.num_ranks <= rank < self.num_ranks:
            raise IndexError(rank)
        return segments_of_rank(
            self.parameters,
            rank % self.num_ranks,
            num_ranks=self.num_ranks,
            zero_stage=self.zero_stage,
            part_size=self.part_size,
        )


def segments_of_rank(
    parameters: tuple[Parameter, ...], rank: int, *, num_ranks: int, zero_stage: int, part_size: int
) -> tuple[Segment, ...]:
    """The runs of the flat space that a rank saves: one in stages 0 to 2, one per parameter in stage 3."""
    last = parameters[-1]
    total = last.offset + torch.Size(last.shape).numel()
    if zero_stage < 3:
        runs = [(rank * part_size, min((rank + 1) * part_size, total))]
    else:
        ranges = [(p.offset, own_range(p, rank, num_ranks=num_ranks)) for p in parameters]
        runs = [(offset + begin, offset + end) for offset, (begin, end) in ranges]
    segments, at = [], 0
    for begin, end in runs:
        if end > begin:
            segments.append(Segment(start=begin, length=end - begin, at=at))
            at += end - begin
    return tuple(segments)
