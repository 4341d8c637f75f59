"""Gives a network's float32 layers their values: from the whole flat space, or gathered from every rank's elements."""

from collections.abc import Sequence

import torch
from torch import nn

from cmscale.distributed.compat import all_gather_flat
from cmscale.engine.flat_space import number_parameters
from cmscale.model.float32 import set_values
from cmscale.runs.manifests import Parameter
from cmscale.runs.partition import Partition


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
        partition: Which rank holds which elements of the flat space.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[Parameter],
        *,
        partition: Partition,
        rank: int,
        device: torch.device,
    ) -> None:
        super().__init__(network, parameters, device=device)
        pieces = _pieces(partition, self._ranges)
        self._own = [slice(at, at + length) for at, _, length in pieces[rank]]
        self._longest = max(sum(length for *_, length in of_rank) for of_rank in pieces)
        self._num_ranks = len(pieces)
        self._sizes: list[int] = []  # of what is gathered, in turn: pieces, and after each rank's the padding
        self._is_piece: list[bool] = []
        self._destinations: list[torch.Tensor] = []
        for of_rank in pieces:
            lengths = [length for *_, length in of_rank]
            self._sizes += [*lengths, self._longest - sum(lengths)]
            self._is_piece += [*[True] * len(lengths), False]
            self._destinations += [self._values[to : to + length] for _, to, length in of_rank]

    @torch.no_grad()
    def gather(self, local: torch.Tensor) -> None:
        """Sets the values from the fp32 elements that each rank has in `local`. Collective."""
        if not self._ranges:
            return
        own = torch.cat([local[piece] for piece in self._own]) if self._own else local.new_zeros(0)
        sent = self._values.new_zeros(self._longest)
        sent[: own.numel()].copy_(own)
        gathered = sent
        if self._num_ranks > 1:
            gathered = self._values.new_zeros(self._num_ranks * self._longest)
            all_gather_flat(gathered, sent)
        sources = [part for part, taken in zip(gathered.split(self._sizes), self._is_piece, strict=True) if taken]
        torch._foreach_copy_(self._destinations, sources)


def copied_values(network: nn.Module, flat: torch.Tensor, *, device: torch.device) -> None:
    """Gives the float32 layers of a network that is never trained their values. Call it before ZeRO partitions it."""
    Float32Values(network, number_parameters(network), device=device).copy(flat)


def _pieces(partition: Partition, ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int, int]]]:
    """By rank: (place in the rank's elements, place in the ranges put together, length) of what it has of them."""
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(len(partition))]
    to = 0
    for begin, end in ranges:
        for rank, at, length in partition.find(begin, end - begin):
            pieces[rank].append((at, to, length))
            to += length
    return pieces
