"""Collectives on small values, by which the ranks agree; with one rank they return their argument."""

import datetime
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from cmscale.distributed.compat import process_groups, set_timeout

T = TypeVar("T")

LOOK_SECONDS = 5.0
"""Between two looks of ranks that wait for one of them: they agree so often, so that no collective waits for long."""


def bound_collectives(*, timeout_minutes: float) -> None:
    """Sets the timeout of every process group: a library that makes its own groups leaves them torch's 30 minutes."""
    if dist.is_initialized():
        for group in process_groups():
            set_timeout(group, datetime.timedelta(minutes=timeout_minutes))


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective."""
    return max_over_ranks(int(flag)) > 0


def any_ranks(*flags: bool) -> list[bool]:
    """Of each flag, whether it is set on any rank; as fast as one flag. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(flags)
    tensor = torch.tensor([int(flag) for flag in flags], dtype=torch.int64)  # on the CPU, as in `max_over_ranks`
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [value > 0 for value in tensor.tolist()]


def all_ranks(flag: bool) -> bool:
    """Whether the flag is set on every rank. Collective."""
    return not any_rank(not flag)


def max_over_ranks(value: int) -> int:
    """The largest of the ranks' values. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64)  # on the CPU, so gloo sends it and no device waits
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank. Values are small and are pickled: ranks of one job trust each other. Collective."""
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
    """Rank 0's array, of any size, on every rank; the others pass None. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert array is not None, "rank 0 passes the array"
        return array
    shape, dtype = from_main(None if array is None else (array.shape, array.dtype))
    sent = np.empty(shape, dtype) if array is None else np.ascontiguousarray(array)
    dist.broadcast(torch.from_numpy(sent), src=0)  # on the CPU: by gloo
    return sent


def barrier() -> None:
    """Waits for every rank. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def together(action: Callable[[], T]) -> T:
    """Runs `action()` on every rank; all wait until the last has done, however long that takes. Collective.

    For what may wait for storage, on one rank alone. Meanwhile the ranks look together whether all have done, in a
    thread, so that no collective waits for longer than `LOOK_SECONDS`, and `action` is free to be interrupted. It must
    call no collective.

    Raises:
        Exception: what `action` raised here; where it did not, what it raised on the first rank that it failed on.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    done, broken = threading.Event(), []
    thread = threading.Thread(target=_look, args=(done, broken), name="looks", daemon=True)
    thread.start()
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    done.set()
    thread.join()
    if broken:
        raise error or broken[0]
    errors = gather(error)
    if first := error or next(filter(None, errors), None):
        raise first
    return cast(T, result)


def _look(done: threading.Event, broken: list[Exception]) -> None:
    """Looks until every rank has done; an error, as of a rank that has died, goes to `broken`."""
    try:
        while any_rank(not done.wait(LOOK_SECONDS)):
            pass
    except Exception as error:
        broken.append(error)


def on_main(action: Callable[[], T]) -> T | None:
    """Runs `action()` on rank 0. Returns its result there and None elsewhere. Collective.

    Raises:
        Exception: whatever `action` raises, on every rank.
    """
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
