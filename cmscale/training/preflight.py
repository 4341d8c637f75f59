"""Owns what every rank looks at before a run begins: a node that can't do the work is named within seconds."""

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
LEAST_MEMORY = 256 * 2**20  # bytes of the host's memory a rank; less, and starting would end in a kill
LEAST_GPU_SHARE = 0.25  # of the GPU's memory; less, and somebody else's process holds it
WRITTEN = 2**20  # bytes
SEEN_SECONDS = 10.0  # for a file to be seen from another node
PEERS_SECONDS = 5.0  # that ranks of good nodes wait, so that the job ends by the bad node's word


class PreflightFailed(RuntimeError):
    """A node is not fit for the run; names it."""


def check(config: Config, run: RunDir, world: World) -> None:
    """Device, memory, storage, equal versions, a collective on the device. Collective.

    Raises:
        PreflightFailed: on every rank, with the first problem; on ranks that have none, a few seconds later.
    """
    own: list[str] = []
    for what in (check_device, check_memory, check_storage):
        own += _problem(what, run, world)
    mine = versions(config)
    everybody = gather((own, mine))
    found = [(rank, problem) for rank, (problems, _) in enumerate(everybody) for problem in problems]
    for rank, (_, theirs) in enumerate(everybody):
        named = [name for name in mine if theirs[name] != everybody[0][1][name]]
        if named:
            found.append((rank, f"{named[0]} is {theirs[named[0]]}, on rank 0 {everybody[0][1][named[0]]}"))
    _stop_if(found, world)
    token = from_main(uuid.uuid4().hex)
    shared = run.logs / f".preflight-{token}"
    if world.is_main:
        shared.touch()
    barrier()
    late = gather(_problem(check_shared, shared, world) + _problem(check_collective, run, world))
    if world.is_main:
        shared.unlink(missing_ok=True)
    _stop_if([(rank, problem) for rank, problems in enumerate(late) for problem in problems], world)


def check_device(_: RunDir, world: World) -> None:
    """The device multiplies."""
    ones = torch.ones(64, 64, device=world.device)
    if float((ones @ ones).sum()) != 64**3:
        raise RuntimeError(f"{world.device} multiplies wrongly")


def check_memory(_: RunDir, world: World) -> None:
    """There is some left, on the host and on the GPU."""
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
    """The run's folder takes a file, durably, and gives it back."""
    run.logs.mkdir(parents=True, exist_ok=True)
    path = run.logs / f".preflight-rank-{world.rank}"
    data = os.urandom(WRITTEN)
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != data:
            raise OSError(f"{path}: reads otherwise than it was written")
    finally:
        path.unlink(missing_ok=True)


def check_shared(path: Path, _: World) -> None:
    """What rank 0 writes into the run's folder is seen here."""
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise FileNotFoundError(f"{path.parent}: is not the folder that rank 0 sees; a run needs a shared one")
        time.sleep(0.05)


def check_collective(_: RunDir, world: World) -> None:
    """A sum over all ranks, on the device."""
    if not dist.is_initialized():
        return
    ones = torch.ones(1024, device=world.device)
    dist.all_reduce(ones)
    if float(ones.sum()) != 1024.0 * world.num_ranks:
        raise RuntimeError(f"a sum over {world.num_ranks} ranks gave {float(ones.mean())}")


def versions(config: Config) -> dict[str, str]:
    """What must be alike on every rank: interpreter, packages, this package's own source, the run's config."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    return found | {"cmscale's source": source.hexdigest()[:12], "config.yaml": config.fingerprint()[:12]}


def _problem(what: Callable[..., None], *arguments: object) -> list[str]:
    try:
        what(*arguments)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def _stop_if(found: list[tuple[int, str]], world: World) -> None:
    nodes = gather(node_name())
    if not found:
        return
    if world.rank not in [rank for rank, _ in found]:
        time.sleep(PEERS_SECONDS)
    rank, problem = found[0]
    raise PreflightFailed(f"preflight: {nodes[rank]} (rank {rank}): {problem}")
