"""Owns networks that are evaluated and never trained (target, teacher), where every rank holds them whole."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cmscale.engine.masters import settle


class FrozenNetwork:
    """A network whose parameters are views of one flat buffer in the compute dtype.

    `publish` fills the buffer from the ranks' fp32 parts with one all-gather. The buffer is padded to
    `num_ranks x part_size`, where rank r's part is flat[r part_size : (r + 1) part_size].
    """

    def __init__(
        self, module: nn.Module, *, dtype: torch.dtype, device: torch.device, part_size: int, num_ranks: int
    ) -> None:
        self.module = module.to(device=device, dtype=dtype).requires_grad_(False)
        self._flat = torch.zeros(part_size * num_ranks, dtype=dtype, device=device)
        self._sent = torch.zeros(part_size, dtype=dtype, device=device) if num_ranks > 1 else self._flat
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
        """Shows the weights whose fp32 elements the ranks hold in `local`. Collective."""
        self._sent[: local.numel()].copy_(local)
        if self._num_ranks > 1:
            dist.all_gather_single(self._flat, self._sent)


class PartitionedNetwork:
    """A frozen network under ZeRO-3: an engine without optimizer, partitioned as the student is."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self.module: nn.Module = wrapped.module

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self._wrapped(*args, **kwargs)

    @torch.no_grad()
    def publish(self, local: torch.Tensor, *, own_lengths: list[int]) -> None:
        """Copies the rank's own elements into each parameter's partition; no communication."""
        at = 0
        for parameter, length in zip(self.module.parameters(), own_lengths, strict=True):
            parameter.ds_tensor.data[:length].copy_(local[at : at + length])  # pyright: ignore[reportAttributeAccessIssue]
            at += length
        settle(local.device)


Network = Callable[..., torch.Tensor]
