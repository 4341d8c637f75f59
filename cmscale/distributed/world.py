"""Owns where this process stands among the others, and how they agree on small values."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from cmscale.errors import UserError


@dataclass(frozen=True)
class World:
    """Ranks and nodes. `rank` counts over all nodes, `rank_of_node` within one."""

    rank: int = 0
    num_ranks: int = 1
    rank_of_node: int = 0
    ranks_per_node: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def num_nodes(self) -> int:
        return max(1, self.num_ranks // self.ranks_per_node)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def detect(device: str = "auto") -> World:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; none set means a world of one.

    Every launcher (the project's own jobs, torchrun) sets these four and MASTER_ADDR and MASTER_PORT.

    Args:
        device: `auto` takes CUDA where there is one.

    Raises:
        UserError: `cuda` on a machine without.
    """
    environment = os.environ
    num_ranks = int(environment.get("WORLD_SIZE", "1"))
    return World(
        rank=int(environment.get("RANK", "0")),
        num_ranks=num_ranks,
        rank_of_node=int(environment.get("LOCAL_RANK", "0")),
        ranks_per_node=int(environment.get("LOCAL_WORLD_SIZE", str(num_ranks))),
        device=choose_device(device, rank_of_node=int(environment.get("LOCAL_RANK", "0"))),
    )


def choose_device(device: str, *, rank_of_node: int = 0) -> torch.device:
    """The device of a rank. Raises UserError for `cuda` on a machine without enough GPUs."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and count == 0 and os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0":
        node = os.environ.get("SLURMD_NODENAME", "this node")
        raise RuntimeError(f"{node}: Slurm gave it GPUs and CUDA finds none; its driver may have failed")
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise UserError("engine.device: cuda was asked for, but this machine has no CUDA device; use engine.device=cpu")
    if rank_of_node >= count:
        raise UserError(
            f"engine.device: rank {rank_of_node} of this node has no GPU, there are {count}; lower --gpus-per-node"
        )
    return torch.device("cuda", rank_of_node)


@contextmanager
def same_arithmetic(device: torch.device) -> Iterator[None]:
    """On a CPU one thread: how a sum is split over threads moves its last digits, and some results must be the same on
    any number of ranks, which share a node's processors.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def connect(world: World, *, timeout_minutes: float = 10.0) -> None:
    """Joins the process group (gloo for CPU tensors, NCCL for CUDA), of one rank too: DeepSpeed wants it."""
    if dist.is_initialized():
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    dist.init_process_group(
        backend,
        rank=world.rank,
        world_size=world.num_ranks,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


@contextmanager
def joined(world: World, *, timeout_minutes: float) -> Iterator[None]:
    """The process group of several ranks, left at the end however that comes; a world of one needs none."""
    if world.num_ranks > 1:
        connect(world, timeout_minutes=timeout_minutes)
    try:
        yield
    finally:
        disconnect()


def disconnect() -> None:
    """Leaves the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
