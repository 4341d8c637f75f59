"""Tests what a machine offers for training, for `cmscale doctor`: each thing is tried, not listed."""

import contextlib
import fcntl
import functools
import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cmscale.cli import services
from cmscale.cli.finding import Finding, State
from cmscale.io.counting import counted
from cmscale.io.fetch import cache_folder
from cmscale.io.published import INCEPTION, VGG16, hub_checkpoints

PACKAGES = (
    "torch",
    "deepspeed",
    "webdataset",
    "mosaicml-streaming",
    "boto3",
    "submitit",
    "wandb",
    "lpips",
    "torch-fidelity",
)
GB = 10**9
_LOCKS = "locks in the folder of runs"
_LEAST_FILES = 4096  # open ones, of a rank with its workers and shards
_WEIGHTS = {"weights of FID's Inception": INCEPTION, "weights of LPIPS's VGG": VGG16}


def findings(runs_dir: Path, *, counts: bool = True) -> Iterator[Finding]:
    """Tries everything, one thing after the other. A check that fails in an unexpected way is a failure.

    Args:
        counts: Whether it is shown how much is tried, as some things take a minute to fail.
    """
    rooms = {
        "folder of runs": (runs_dir, 50 * GB),
        "cache of weights": (cache_folder(), 5 * GB),
        "cache of shards (TMPDIR)": (Path(tempfile.gettempdir()), 50 * GB),
    }
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": packages,
        "GPUs": devices,
        "attention": attention,
        "gloo": gloo,
        "NCCL": nccl,
        "limits": limits,
        "shared memory": shared_memory,
        **{what: functools.partial(disk, what, room, wanted=wanted) for what, (room, wanted) in rooms.items()},
        _LOCKS: functools.partial(locks, runs_dir),
        "weight files": weights,
        "Slurm": services.slurm,
        "wandb": services.wandb,
    }
    tried = counted(checks.items(), "trying this machine", total=len(checks), unit="checks", active=counts)
    for name, check in tried:
        try:
            yield from check()
        except Exception as error:
            yield Finding(name, "failure", f"{type(error).__name__}: {' '.join(str(error).split())}", "see the message")


def packages() -> Iterator[Finding]:
    """Whether the packages are installed."""
    yield Finding("python", "ok", f"{sys.version.split()[0]} on {socket.gethostname()}")
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "failure", "is not installed", f"pip install {package}")


def devices() -> Iterator[Finding]:
    """GPUs as torch sees them, with a product of two matrices on each."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            built = torch.version.cuda or "no CUDA"
            remedy = "install a torch whose CUDA the driver knows, or a newer driver"
            yield Finding("GPUs", "failure", f"nvidia-smi is here, but torch ({built}) sees no GPU", remedy)
        else:
            yield Finding("GPUs", "warning", "none", "engine.device=auto takes the CPU; train on a node with GPUs")
        return
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        is_right = float((ones @ ones).sum()) == 64**3
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free / GB:.0f} of {total / GB:.0f} GB free"
        state: State = "ok" if is_right and free > total / 4 else "failure"
        remedy = "" if state == "ok" else "another process holds it, or it is faulty: nvidia-smi"
        yield Finding(f"GPU {index}", state, found, remedy)


def attention() -> Iterator[Finding]:
    """Attention, forward and backward, by the kernel that `model.attention: auto` takes, against the reference."""
    import torch

    from cmscale.model.attention import attend
    from cmscale.model.attention_choice import Shape, best, kernel_name, try_out

    cpu = best({"sdpa": functools.partial(attend, kind="sdpa")}, Shape(64, 2, 64), torch.device("cpu"), torch.float32)
    yield _attention("attention on cpu", cpu.kind, cpu)
    if torch.cuda.is_available():
        device, shape = torch.device("cuda"), Shape(length=1024, heads=8, dim=64)  # of the LSUN networks
        choice = try_out(shape, device, torch.float16)
        yield _attention("attention on cuda", kernel_name(choice, shape, device, torch.float16), choice)


def _attention(what: str, kernel: str, choice: Any) -> Finding:
    if choice.kind == "reference":
        return Finding(what, "failure", choice.why, "install a torch that fits this device")
    return Finding(what, "ok", f"{kernel}: {choice.why}")


def gloo() -> Iterator[Finding]:
    """A sum over two members of a gloo group, at the address and interface that a rank of this node would take."""
    import torch.distributed as dist

    from cmscale.distributed.interfaces import GLOO, describe_interfaces, is_loopback, own_address

    interface, address = os.environ.get(GLOO), own_address()
    where = f"interface {interface}" if interface else address
    _sum_over_two(lambda store, rank: dist.ProcessGroupGloo(store, rank, 2), "cpu", "cpu")
    if interface is None and is_loopback(address):
        remedy = f"ranks of several nodes take the interface that leads to rank 0, or {GLOO}; correct /etc/hosts"
        yield Finding(
            "gloo", "warning", f"works; this node's name resolves to {address} ({describe_interfaces()})", remedy
        )
    else:
        yield Finding("gloo", "ok", f"a sum over two members works at {where}")


def nccl() -> Iterator[Finding]:
    """A sum over NCCL on one or two GPUs."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return
    options = dist.ProcessGroupNCCL.Options()
    if torch.cuda.device_count() > 1:
        _sum_over_two(lambda store, rank: dist.ProcessGroupNCCL(store, rank, 2, options), "cuda:0", "cuda:1")
        yield Finding("NCCL", "ok", "a sum over two GPUs works")
        return
    group = dist.ProcessGroupNCCL(dist.HashStore(), 0, 1, options)
    ones = torch.ones(8, device="cuda:0")
    group.allreduce([ones]).wait()  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize()
    yield Finding("NCCL", "ok", "a sum on one GPU works (this node has no second one)")


def _sum_over_two(make: Callable[[Any, int], Any], *members: str) -> None:
    """Sums ones over two members of a group, each in a thread. Raises what either raises."""
    import torch
    import torch.distributed as dist

    store, errors = dist.HashStore(), []

    def member(rank: int) -> None:
        try:
            ones = torch.ones(8, device=members[rank])
            make(store, rank).allreduce([ones]).wait()
            if float(ones.sum()) != 8 * len(members):
                raise RuntimeError(f"the sum of ones over {len(members)} members is {float(ones.mean())}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=member, args=(rank,), daemon=True) for rank in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError("no answer within 60 s")


def limits() -> Iterator[Finding]:
    """Processors, and how many files a process may open."""
    count = len(os.sched_getaffinity(0))
    yield Finding("processors", "ok", str(count))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    state: State = "ok" if allowed == resource.RLIM_INFINITY or allowed >= _LEAST_FILES else "warning"
    yield Finding("open files", state, f"at most {allowed}", "" if state == "ok" else f"ulimit -n {_LEAST_FILES}")


def shared_memory() -> Iterator[Finding]:
    """Room in /dev/shm, through which workers hand batches to their rank."""
    try:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.write(bytes(1 << 20))
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        yield Finding(
            "shared memory", "failure", f"/dev/shm: {error.strerror}", "mount it writable; data workers need it"
        )
        return
    state: State = "ok" if free >= GB else "warning" if free >= GB / 8 else "failure"
    found = f"{free / GB:.1f} GB free in /dev/shm"
    remedy = "" if state == "ok" else "give a container --shm-size=8g, or set data.workers=0"
    left = _left_by_workers(Path("/dev/shm"))
    if sum(left) >= GB / 8:
        state = "warning" if state == "ok" else state
        found += f", {sum(left) / GB:.1f} GB held by {len(left)} files of killed data workers"
        remedy = "rm /dev/shm/torch_*, while nothing of yours runs on the node" + (f"; {remedy}" if remedy else "")
    yield Finding("shared memory", state, found, remedy)


def _left_by_workers(folder: Path) -> list[int]:
    """Sizes of this user's batches that nobody receives any more.

    torch removes the name of a batch, `torch_PID_...`, as soon as it has the memory; a worker killed between the two
    leaves the file until the node is restarted.
    """
    left = []
    for file in folder.glob("torch_*_*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            seen, pid = file.stat(), file.name.split("_")[1]
            if seen.st_uid == os.getuid() and not Path("/proc", pid).exists():
                left.append(seen.st_size)
    return left


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there: what is missing is made by those who need it."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))


def disk(what: str, folder: Path, *, wanted: float, least: float = GB) -> Iterator[Finding]:
    """Writes a file, and looks for room."""
    there = nearest(folder)
    if not there.is_dir():
        yield Finding(what, "failure", f"{there}: is no folder", "name another folder, or remove what is there")
        return
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".cmscale-doctor-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(what, "failure", f"{there}: {error.strerror}", "name another folder, or make room")
        return
    free = shutil.disk_usage(there).free
    state: State = "ok" if free >= wanted else "warning" if free >= least else "failure"
    yield Finding(what, state, f"{there}: {free / GB:.0f} GB free", "" if state == "ok" else "make room there")


def locks(runs_dir: Path) -> Iterator[Finding]:
    """Whether flock keeps two holders apart in the folder of runs; nothing if it takes no file, as `disk` says."""
    with contextlib.ExitStack() as stack:
        try:
            one = stack.enter_context(tempfile.NamedTemporaryFile(dir=nearest(runs_dir), prefix=".cmscale-doctor-"))
            two = stack.enter_context(Path(one.name).open("rb"))
        except OSError:
            return
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield Finding(_LOCKS, "warning", f"no flock ({error.strerror}); locks are files", "mount it with flock")
            return
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Finding(_LOCKS, "ok", "flock keeps two holders apart")
            return
    yield Finding(_LOCKS, "failure", "flock lets two holders in", "keep runs on another file system")


def weights() -> Iterator[Finding]:
    """Whether weight files are here, which compute nodes often can't download."""
    folder = hub_checkpoints()
    for what, wanted in _WEIGHTS.items():
        path = folder / wanted.name
        if path.is_file() and path.stat().st_size:
            yield Finding(what, "ok", str(path))
        else:
            remedy = f"it is downloaded at first use; on nodes without internet set {wanted.key} to a file or s3://"
            yield Finding(what, "warning", f"not in {folder}", remedy)
