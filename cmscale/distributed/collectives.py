"""Collectives by which the ranks agree on small values; each does nothing where there is one rank."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


def bound_collectives(*, timeout_minutes: float) -> None:
    """Gives every process group its timeout: a library that makes groups of its own gives them torch's 30 minutes."""
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.set_timeout(datetime.timedelta(minutes=timeout_minutes), group)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective."""
    return max_over_ranks(int(flag)) > 0


def all_ranks(flag: bool) -> bool:
    """Whether the flag is set on every rank. Collective."""
    return not any_rank(not flag)


def max_over_ranks(value: int) -> int:
    """The largest of the ranks' values. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64)  # on the CPU: gloo carries it beside any device's traffic
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def gather(value: Any) -> list[Any]:
    """Every rank's value (small, picklable by the ranks' own trust in each other), by rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def array_from_main(array: np.ndarray | None) -> np.ndarray:
    """Rank 0's array (the others give None), of any size, on every rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert array is not None, "rank 0 has the array"
        return array
    shape, dtype = from_main(None if array is None else (array.shape, array.dtype))
    sent = np.empty(shape, dtype) if array is None else np.ascontiguousarray(array)
    dist.broadcast(torch.from_numpy(sent), src=0)  # on the CPU: by gloo
    return sent


def barrier() -> None:
    """Waits for every rank. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def on_main(action: Callable[[], T]) -> T | None:
    """Runs `action()` on rank 0: its result there, None elsewhere; what it raises, every rank raises. Collective."""
    result: T | None = None
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = action()
        except Exception as caught:
            error = caught
    error = from_main(error)
    if error is not None:
        raise error
    return result
