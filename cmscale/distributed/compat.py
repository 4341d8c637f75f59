"""The parts of torch whose names differ between versions, or are private: here alone, and guarded."""

import datetime
import platform
from typing import Any

import torch
import torch.distributed as dist

from cmscale.io.packages import private


def all_gather_flat(gathered: torch.Tensor, own: torch.Tensor) -> None:
    """Gathers every rank's `own` [n] into `gathered` [num_ranks n], by rank. Collective.

    torch 2.14 calls this collective `all_gather_single`, earlier versions `all_gather_into_tensor`.
    """
    collective = getattr(dist, "all_gather_single", None) or private(dist, "all_gather_into_tensor", package="torch")
    collective(gathered, own)


def rendezvous_store(*, rank: int, num_ranks: int, timeout: datetime.timedelta) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT by which ranks meet, as `init_process_group` makes it. Collective."""
    store, _, _ = next(private(dist, "rendezvous", package="torch")("env://", rank, num_ranks, timeout=timeout))
    store.set_timeout(timeout)
    return store


def default_store() -> Any:
    """The store of the process group that `init_process_group` made."""
    return private(dist.distributed_c10d, "_get_default_store", package="torch")()


def process_groups() -> list[Any]:
    """Every process group of this process, those that other libraries made included."""
    world = private(dist.distributed_c10d, "_world", package="torch")
    return list(private(world, "pg_map", package="torch"))


def set_timeout(group: Any, timeout: datetime.timedelta) -> None:
    """Bounds the collectives of a group. Public since torch 2.14; `_set_pg_timeout` before."""
    setter = getattr(dist, "set_timeout", None)
    if setter is None:
        setter = private(dist.distributed_c10d, "_set_pg_timeout", package="torch")
    setter(timeout, group)


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16. Without them torch emulates it, many times slower."""
    if platform.machine() in ("x86_64", "AMD64"):  # torch's own question is true for all of AVX-512
        return bool(private(torch.cpu, "_is_avx512_bf16_supported", package="torch")())
    return bool(private(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", package="torch")())


def cpu_has_fp16() -> bool:
    """Whether torch's CPU kernels compute in fp16 on this machine."""
    return bool(private(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", package="torch")())
