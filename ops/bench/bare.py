"""Runs the bare operations of a training step: its convolutions or matrix products, each alone on its shapes.

The operations are recorded while the method's own loss runs forward and backward on the meta device. Their rate is the
limit of a step on the device with the libraries that are installed.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from cmscale.config import Config
from cmscale.training.estimate.counts import on_meta

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


@dataclass(frozen=True)
class _Shape:
    """A tensor of an operation's arguments."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Operation:
    """An operation, its arguments with shapes in place of tensors, and how often a micro-batch has it."""

    function: Any
    leaves: tuple[Any, ...]
    structure: Any
    times: int

    def arguments(self, device: torch.device) -> Any:
        """The arguments with random tensors."""

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, _Shape):
                return leaf
            storage = 1 + sum((size - 1) * stride for size, stride in zip(leaf.sizes, leaf.strides, strict=True))
            values = torch.randn(storage, device=device).to(leaf.dtype)
            return values.as_strided(leaf.sizes, leaf.strides)

        return tree_unflatten([made(leaf) for leaf in self.leaves], self.structure)


class _Recorder(TorchDispatchMode):
    def __init__(self, wanted: tuple[Any, ...]) -> None:
        super().__init__()
        self.wanted = wanted
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in self.wanted:
            leaves, structure = tree_flatten((args, kwargs or {}))
            shapes = tuple(tree_map(_shape, leaf) for leaf in leaves)
            self.found[func, shapes, structure] += 1
        return func(*args, **(kwargs or {}))


def _shape(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return _Shape(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype)


def recorded(config: Config, *, wanted: tuple[Any, ...] = CONVOLUTIONS) -> tuple[list[Operation], int]:
    """The operations of a micro-batch's loss, forward and backward, and their FLOP."""
    size = config.train.micro_batch_size
    prepared = on_meta(config, size=size, activation_checkpointing=False)
    with FlopCounterMode(display=False) as counter, _Recorder(wanted) as recorder:
        prepared.compute()
    operations = [
        Operation(function, leaves, structure, times) for (function, leaves, structure), times in recorder.found.items()
    ]
    packets = {function.overloadpacket for function in wanted}
    by_function = counter.get_flop_counts()["Global"]
    return operations, sum(flop for packet, flop in by_function.items() if packet in packets)


def run(operations: list[Operation], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of all operations; only the operations themselves are timed."""
    total = 0.0
    for operation in operations:
        args, kwargs = operation.arguments(device)
        with torch.no_grad():
            operation.function(*args, **kwargs)  # the library chooses its kernel for a shape at first use
            began = clock()
            for _ in range(operation.times):
                operation.function(*args, **kwargs)
            total += clock() - began
    return total


def dense_product(device: torch.device, dtype: torch.dtype, *, seconds: Callable[[], float]) -> float:
    """FLOP per second of a large square matrix product: what the device can do at most."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = 10 if device.type == "cuda" else 4
    torch.mm(left, right)
    began = seconds()
    for _ in range(times):
        torch.mm(left, right)
    return 2 * math.pow(side, 3) * times / (seconds() - began)
