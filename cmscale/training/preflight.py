"""Checks every rank before a run starts, so that an error names a faulty node within seconds."""

import hashlib
import importlib.metadata
import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from cmscale.config import Config
from cmscale.distributed.collectives import barrier, from_main, gather
from cmscale.distributed.world import World
from cmscale.io.process import node_name
from cmscale.runs.folder import RunDir

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "xformers")
LEAST_MEMORY = 256 * 2**20  # bytes of host memory per rank; with less, the kernel would kill the process
LEAST_GPU_SHARE = 0.25  # of the GPU's memory; if less is free, another process uses the GPU
WRITTEN = 2**20  # bytes of the storage check
SEEN_SECONDS = 10.0  # until a file must be visible on another node
PEERS_SECONDS = 5.0  # by which ranks on sound nodes wait, so that the first error in the job's log is the faulty node's


class PreflightFailed(RuntimeError):
    """A check failed; the message names the node."""


def check(config: Config, run: RunDir, world: World) -> None:
    """Checks device, memory, storage, equal versions, a shared run folder, and a collective. Collective.

    What a node's ranks share is checked by its first rank, as thousands of them would load the file system for nothing.

    Raises:
        PreflightFailed: on every rank, with the first problem; on ranks without a problem a few seconds later.
    """
    problems: list[str] = []
    of_node = (check_storage,) if world.rank_of_node == 0 else ()
    for one_check in (check_device, check_memory, *of_node):
        problems += _problem(one_check, run, world)
    reports = gather((problems, versions(config, with_source=world.rank_of_node == 0)))
    found = [(rank, problem) for rank, (reported, _) in enumerate(reports) for problem in reported]
    expected = reports[0][1]
    for rank, (_, installed) in enumerate(reports):
        different = [name for name in expected if installed.get(name, expected[name]) != expected[name]]
        if different:
            name = different[0]
            found.append((rank, f"{name} is {installed[name]}, but {expected[name]} on rank 0"))
    _raise_first(found, world)
    token = from_main(uuid.uuid4().hex)
    shared = run.logs / f".preflight-{token}"
    if world.is_main:
        shared.touch()
    barrier()
    unseen = _problem(check_shared, shared, world) if world.rank_of_node == 0 else []
    collective = gather(unseen + _problem(check_collective, run, world))
    if world.is_main:
        shared.unlink(missing_ok=True)
    _raise_first([(rank, problem) for rank, reported in enumerate(collective) for problem in reported], world)


def check_device(_: RunDir, world: World) -> None:
    """Multiplies two matrices on the device."""
    ones = torch.ones(64, 64, device=world.device)
    if float((ones @ ones).sum()) != 64**3:
        raise RuntimeError(f"{world.device}: a matrix product is wrong; take the node out of use")


def check_memory(_: RunDir, world: World) -> None:
    """Checks the free memory of the host and of the GPU."""
    available = psutil.virtual_memory().available
    if available < LEAST_MEMORY * world.ranks_per_node:
        raise MemoryError(f"only {available / 2**20:.0f} MiB of memory left for {world.ranks_per_node} ranks")
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        if free < LEAST_GPU_SHARE * total:
            raise MemoryError(
                f"{world.device} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: another process holds it"
            )


def check_storage(run: RunDir, world: World) -> None:
    """Writes a file durably to the run's folder and reads it."""
    run.logs.mkdir(parents=True, exist_ok=True)
    path = run.logs / f".preflight-rank-{world.rank}"
    data = os.urandom(WRITTEN)
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != data:
            raise OSError(f"{path}: the data read is not the data written")
    finally:
        path.unlink(missing_ok=True)


def check_shared(path: Path, _: World) -> None:
    """Waits until a file of rank 0 is visible in the run's folder."""
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise FileNotFoundError(
                f"{path.parent}: does not show a file that rank 0 wrote; use a folder that all nodes share"
            )
        time.sleep(0.05)


def check_collective(_: RunDir, world: World) -> None:
    """Sums ones over all ranks, on the device."""
    if not dist.is_initialized():
        return
    ones = torch.ones(1024, device=world.device)
    dist.all_reduce(ones)
    if float(ones.sum()) != 1024.0 * world.num_ranks:
        raise RuntimeError(f"the sum of 1 over {world.num_ranks} ranks is {float(ones.mean())}")


def versions(config: Config, *, with_source: bool = True) -> dict[str, str]:
    """What must be equal on every rank: Python, packages, the run's config and, on request, cmscale's source."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    found["config.yaml"] = config.fingerprint()[:12]
    if with_source:
        source = hashlib.sha256()
        for path in sorted(Path(__file__).parents[1].rglob("*.py")):
            source.update(path.read_bytes())
        found["cmscale's source"] = source.hexdigest()[:12]
    return found


def _problem(one_check: Callable[..., None], *arguments: object) -> list[str]:
    """The error of a check, or nothing."""
    try:
        one_check(*arguments)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def _raise_first(found: list[tuple[int, str]], world: World) -> None:
    """Raises PreflightFailed on every rank for the first of the problems (rank, text). Collective."""
    nodes = gather(node_name())
    if not found:
        return
    if world.rank not in [rank for rank, _ in found]:
        time.sleep(PEERS_SECONDS)
    rank, problem = found[0]
    raise PreflightFailed(f"preflight: {nodes[rank]} (rank {rank}): {problem}")
