"""Gives a network's float32 layers their values: from the whole flat space, or gathered from every rank's elements."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from cmscale.distributed.compat import all_gather_flat
from cmscale.engine.flat_space import number_parameters
from cmscale.model.float32 import set_values
from cmscale.runs.manifests import Parameter, Segment


class Float32Values:
    """The float32 values of one network's float32 layers, whole on every rank.

    Args:
        network: A network in a lower precision; `float32_parameters`, if it has them, are those layers' parameters in
            the order of the flat space.
        parameters: The flat space.
    """

    def __init__(self, network: nn.Module, parameters: Sequence[Parameter], *, device: torch.device) -> None:
        names = getattr(network, "float32_parameters", ())
        shapes = {place.name: torch.Size(place.shape) for place in parameters}
        offsets = {place.name: place.offset for place in parameters}
        sizes = [shapes[name].numel() for name in names]
        self._ranges = [(offsets[name], offsets[name] + size) for name, size in zip(names, sizes, strict=True)]
        self._values = torch.zeros(sum(sizes), device=device)
        views = self._values.split(sizes) if sizes else ()
        set_values(network, {name: view.view(shapes[name]) for name, view in zip(names, views, strict=True)})

    @torch.no_grad()
    def copy(self, flat: torch.Tensor) -> None:
        """Sets the values from the whole flat space."""
        at = 0
        for begin, end in self._ranges:
            self._values[at : at + end - begin].copy_(flat[begin:end])
            at += end - begin


class GatheredFloat32Values(Float32Values):
    """Such values of a network in training, which can also be gathered from the ranks.

    Args:
        segments_by_rank: Which rank holds which elements of the flat space.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[Parameter],
        *,
        segments_by_rank: Sequence[Sequence[Segment]],
        rank: int,
        device: torch.device,
    ) -> None:
        super().__init__(network, parameters, device=device)
        pieces = [list(_overlaps(segments, self._ranges)) for segments in segments_by_rank]
        self._own = [slice(at, at + length) for at, _, length in pieces[rank]]
        longest = max(sum(length for *_, length in of_rank) for of_rank in pieces)
        self._gathered = torch.zeros(len(pieces) * longest, device=device)
        self._sent = self._gathered.new_zeros(longest) if len(pieces) > 1 else self._gathered
        self._sources: list[torch.Tensor] = []
        self._destinations: list[torch.Tensor] = []
        for number, of_rank in enumerate(pieces):
            start = number * longest
            for _, to, length in of_rank:
                self._sources.append(self._gathered[start : start + length])
                self._destinations.append(self._values[to : to + length])
                start += length

    @torch.no_grad()
    def gather(self, local: torch.Tensor) -> None:
        """Sets the values from the fp32 elements that each rank has in `local`. Collective."""
        if not self._ranges:
            return
        if self._own:
            own = torch.cat([local[piece] for piece in self._own])
            self._sent[: own.numel()].copy_(own)
        if self._sent is not self._gathered:
            all_gather_flat(self._gathered, self._sent)
        torch._foreach_copy_(self._destinations, self._sources)


def copied_values(network: nn.Module, flat: torch.Tensor, *, device: torch.device) -> None:
    """Gives the float32 layers of a network that is never trained their values. Call it before ZeRO partitions it."""
    Float32Values(network, number_parameters(network), device=device).copy(flat)


def _overlaps(segments: Sequence[Segment], ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(place in the rank's elements, place in the ranges put together, length) of what both have; both ascend."""
    before, number = 0, 0  # elements of earlier ranges; the first segment that may overlap
    for begin, end in ranges:
        while number < len(segments) and segments[number].start + segments[number].length <= begin:
            number += 1
        for segment in segments[number:]:
            if segment.start >= end:
                break
            low, high = max(begin, segment.start), min(end, segment.start + segment.length)
            yield segment.at + low - segment.start, before + low - begin, high - low
        before += end - begin
