"""Describes where a job runs: what its command requests, and the placement that a cluster makes of it."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cmscale.config import Restart, Slurm

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class PlacementRequest:
    """What a command's flags and config request of a cluster; None leaves a value to the cluster.

    Attributes:
        gpu_type: Slurm's name of the type of GPU; None for any.
        device_option: What chooses the device, as it is written before the value: `engine.device=`.
    """

    nodes: int
    ranks_per_node: int | None
    partition: str | None
    minutes: int | None
    device: Device
    dry_run: bool
    device_option: str
    slurm: Slurm
    restart: Restart
    gpu_type: str | None = None


@dataclass(frozen=True)
class Placement:
    """Where a job runs.

    Attributes:
        cluster: A name in `launchers.clusters.CLUSTERS`.
        gpus: Whether each rank has a GPU.
        partition: None is the cluster's default.
        minutes: The time limit; None is no limit.
        gpu_type: Slurm's name of the type of GPU; None for any.
    """

    cluster: str
    nodes: int
    ranks_per_node: int
    gpus: bool
    partition: str | None
    minutes: int | None
    slurm: Slurm
    restart: Restart
    gpu_type: str | None = None

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class RankPlace:
    """The place of one rank among all ranks of a job, and where they meet."""

    rank: int
    num_ranks: int
    local_rank: int
    ranks_per_node: int
    master_address: str
    master_port: int


def visible_gpus() -> list[str]:
    """The CUDA devices that a job would see on this machine, as CUDA_VISIBLE_DEVICES names them, without CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
    found = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()])
    if not found and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(index) for index in range(found)]
