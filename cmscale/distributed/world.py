"""Finds this process's rank and device, and joins the process group."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from cmscale.distributed import interfaces
from cmscale.distributed.collectives import together
from cmscale.distributed.compat import rendezvous_store
from cmscale.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place: `rank` counts over all nodes, `rank_of_node` within its node."""

    rank: int = 0
    num_ranks: int = 1
    rank_of_node: int = 0
    ranks_per_node: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0


def detect(device: str = "auto", *, option: str = "--device ") -> World:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; if none is set, the world has one rank.

    Every launcher (this project's jobs, torchrun) sets these four, and MASTER_ADDR and MASTER_PORT.

    Args:
        device: `auto`, `cpu` or `cuda`; `auto` is CUDA if there is a device.
        option: See `choose_device`.

    Raises:
        UserError: `cuda` on a machine without enough GPUs.
    """
    environment = os.environ
    num_ranks = int(environment.get("WORLD_SIZE", "1"))
    return World(
        rank=int(environment.get("RANK", "0")),
        num_ranks=num_ranks,
        rank_of_node=int(environment.get("LOCAL_RANK", "0")),
        ranks_per_node=int(environment.get("LOCAL_WORLD_SIZE", str(num_ranks))),
        device=choose_device(device, rank_of_node=int(environment.get("LOCAL_RANK", "0")), option=option),
    )


def choose_device(device: str, *, rank_of_node: int = 0, option: str = "--device ") -> torch.device:
    """The device of a rank.

    Args:
        option: What chooses the device, as it is written before the value.

    Raises:
        UserError: `cuda` on a machine without enough GPUs.
        RuntimeError: Slurm allocated GPUs and CUDA finds none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and count == 0 and os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0":
        node = os.environ.get("SLURMD_NODENAME", "this node")
        raise RuntimeError(f"{node}: Slurm allocated GPUs there and CUDA finds none; its driver may have failed")
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise UserError(f"{option}cuda: this machine has no CUDA device; use {option}cpu")
    if rank_of_node >= count:
        raise UserError(
            f"{option}{device}: rank {rank_of_node} of this node has no GPU, the node has {count}; "
            "lower --gpus-per-node"
        )
    return torch.device("cuda", rank_of_node)


@contextmanager
def same_arithmetic(device: torch.device) -> Iterator[None]:
    """Runs the block with one CPU thread, so that results do not depend on the number of ranks.

    The ranks of a node share its processors, and the number of threads changes the last digits of a sum.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def connect(world: World, *, timeout_minutes: float = 10.0) -> None:
    """Joins the process group: gloo for CPU tensors, NCCL for CUDA. DeepSpeed needs one for a single rank too.

    Raises:
        UserError: ranks of several nodes can't reach each other by the addresses of their names.
    """
    if dist.is_initialized():
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store = None
    if world.ranks_per_node < world.num_ranks:
        interfaces.await_master(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            rank=world.rank,
            ranks_per_node=world.ranks_per_node,
        )
        store = rendezvous_store(rank=world.rank, num_ranks=world.num_ranks, timeout=timeout)
        interfaces.agree(store, rank=world.rank, num_ranks=world.num_ranks)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.num_ranks, timeout=timeout)


def meet(device: str, *, timeout_minutes: float, prepare: Callable[[], None]) -> None:
    """Joins the process group, then has rank 0 prepare what all ranks work on; they wait with it. Collective.

    Raises:
        Exception: whatever `prepare` raises, on every rank.
    """
    world = detect(device)
    connect(world, timeout_minutes=timeout_minutes)
    together(prepare if world.is_main else lambda: None)


@contextmanager
def joined(world: World, *, timeout_minutes: float) -> Iterator[None]:
    """Joins the process group of several ranks and leaves it when the block ends or fails; one rank needs none."""
    if world.num_ranks > 1:
        connect(world, timeout_minutes=timeout_minutes)
    try:
        yield
    finally:
        disconnect()


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
