"""Networks that are evaluated and never trained (target, teacher): whole on every rank, or partitioned by ZeRO-3."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cmscale.distributed.compat import all_gather_flat
from cmscale.engine.wrappers import partition, settle

Network = Callable[..., torch.Tensor]


class FrozenNetwork:
    """A network whose parameters are views of one flat buffer in the compute dtype, whole on every rank.

    The buffer is padded to `num_ranks x part_size` elements; rank r's part is flat[r part_size : (r + 1) part_size].
    """

    def __init__(
        self, module: nn.Module, *, dtype: torch.dtype, device: torch.device, part_size: int, num_ranks: int
    ) -> None:
        self.module = module.to(device=device, dtype=dtype).requires_grad_(False)
        self._flat = torch.zeros(part_size * num_ranks, dtype=dtype, device=device)
        self._part_size = part_size
        self._num_ranks = num_ranks
        offset = 0
        for parameter in self.module.parameters():
            view = self._flat[offset : offset + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            offset += view.numel()

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def publish(self, local: torch.Tensor) -> None:
        """Sets the weights from the fp32 elements that each rank has in `local`: one all-gather. Collective."""
        if self._num_ranks == 1:
            self._flat[: local.numel()].copy_(local)
            return
        sent = self._flat.new_zeros(self._part_size)
        sent[: local.numel()].copy_(local)
        all_gather_flat(self._flat, sent)


class PartitionedNetwork:
    """A frozen network under ZeRO-3: a DeepSpeed engine without optimizer, partitioned like the student."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self.module: nn.Module = wrapped.module

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self._wrapped(*args, **kwargs)

    @torch.no_grad()
    def publish(self, local: torch.Tensor, *, own_lengths: list[int]) -> None:
        """Sets this rank's part of each parameter from its fp32 elements in `local`, without communication."""
        at = 0
        for parameter, length in zip(self.module.parameters(), own_lengths, strict=True):
            partition(parameter)[:length].copy_(local[at : at + length])
            at += length
        settle(local.device)
