"""Rank functions of the fault tests: they train a run with a fault that happens once or in every start."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from cmscale.distributed import collectives
from cmscale.distributed import world as worlds
from cmscale.engine import staged
from cmscale.runs.folder import RunDir
from cmscale.training import assemble, loop

GLOBAL_BATCH = 8


def main(run_dir: str, fault: str) -> str:
    """A job's worker with a fault on rank 1 before step 4; all faults but `raises` happen only in the first start."""
    marker = Path(run_dir) / "happened"
    if os.environ["RANK"] == "1" and (fault == "raises" or not marker.exists()):
        actions = {"stops": stop, "holds the GIL": hold_the_gil, "raises": fail}

        def happen(_: assemble.Parts) -> None:
            marker.touch()
            actions[fault]()

        before_step(4, happen)
    return loop.main(run_dir)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    threading.Event().wait()  # continued by the watchdog to print its stacks; it takes no more steps


def hold_the_gil() -> None:
    import ctypes

    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # a PyDLL call keeps the GIL
    for _ in range(2):  # the second call blocks for ever, and no signal interrupts it
        library.pthread_mutex_lock(mutex)


def fail() -> None:
    raise RuntimeError("rank 1 is out of luck")


def before_step(step: int, action: Callable[[assemble.Parts], None]) -> None:
    """Calls `action` before the step that follows `step` applied ones."""
    original = assemble.Parts.step

    def acting(self: assemble.Parts, batch: Any, values: Any) -> Any:
        if values.step == step:
            action(self)
        return original(self, batch, values)

    assemble.Parts.step = acting


def scenarios(root: str) -> None:
    """Trains several runs in the same ranks, each with another fault; prints how each ended."""
    worlds.connect(worlds.detect("cpu"))
    worlds.disconnect = lambda: None  # the ranks stay connected from run to run
    ends = {name: ended(Path(root) / name, fault) for name, fault in FAULTS.items()}
    if os.environ["RANK"] == "0":
        damage(Path(root) / "golden", Path(root) / "damaged")
    collectives.barrier()
    ends["damaged"] = ended(Path(root) / "damaged", contextlib.nullcontext)
    ends["signals, resumed"] = ended(Path(root) / "signals", contextlib.nullcontext)
    print(json.dumps(ends))


def ended(run_dir: Path, fault: Callable[[], Any]) -> str:
    with fault():
        try:
            return loop.main(str(run_dir))
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def signals_during_a_save() -> Any:
    """Sends both signals twice on each rank while the second checkpoint is written."""
    write, saves = staged.save_file, []

    def interrupted(*arguments: Any, **more: Any) -> None:
        saves.append(1)
        for number in (signal.SIGTERM, signal.SIGUSR2) * 2 if len(saves) == 2 else ():
            os.kill(os.getpid(), number)
        write(*arguments, **more)

    return patched(staged, "save_file", interrupted)


def signals_to_data_workers() -> Any:
    """Sends the preemption signals to the data workers of this rank before every step."""
    import multiprocessing

    original = assemble.Parts.step

    def signalling(self: assemble.Parts, batch: Any, values: Any) -> Any:
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            for number in (signal.SIGUSR2, signal.SIGTERM):
                os.kill(worker.pid or 0, number)
        return original(self, batch, values)

    return patched(assemble.Parts, "step", signalling)


def rank_1_is_slow() -> Any:
    original = assemble.Parts.step

    def slow(self: assemble.Parts, batch: Any, values: Any) -> Any:
        if os.environ["RANK"] == "1" and values.step >= 7:
            time.sleep(1.0)
        return original(self, batch, values)

    return patched(assemble.Parts, "step", slow)


def nan_in(batches: Collection[int]) -> Callable[[], Any]:
    """Sets the images of rank 1 to NaN in these global batches (counted from 0)."""

    def spoilt() -> Any:
        original = assemble.to_device

        def to_device(batch: Any, device: torch.device) -> torch.Tensor:
            images = original(batch, device)
            bad = batch.positions[0] // GLOBAL_BATCH in batches and os.environ["RANK"] == "1"
            return images * math.nan if bad else images

        return patched(assemble, "to_device", to_device)

    return spoilt


def fp16_on_this_cpu() -> Any:
    """Allows fp16 on the CPU, where it works but is slow."""
    from engine_work import allow_fp16

    allow_fp16()
    return contextlib.nullcontext()


def no_space_for_step_6() -> Any:
    """Simulates a full disk on rank 1 for the third checkpoint."""
    write = staged.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-000000006" in str(path) and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    return patched(staged, "save_file", full)


def damage(whole: Path, copy: Path) -> None:
    """Copies a finished run, flips a byte of its newest checkpoint, and removes the manifest of the one before."""
    shutil.copytree(whole, copy)
    run = RunDir(copy)
    file = run.checkpoint(9) / "rank-0001-of-0002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (run.checkpoint(6) / "manifest.json").unlink()


FAULTS: dict[str, Callable[[], Any]] = {
    "golden": contextlib.nullcontext,
    "signals": signals_during_a_save,
    "workers": signals_to_data_workers,
    "nan once": nan_in([4]),
    "nan three times": nan_in([4, 5, 6]),
    "nan for ever": nan_in(range(4, 1000)),
    "straggler": rank_1_is_slow,
    "no space": no_space_for_step_6,
    "overflow": fp16_on_this_cpu,
}


def as_a_job_does(run_dir: str) -> None:
    """Trains; an error ends the rank at once with status 1."""
    try:
        print(json.dumps(loop.main(run_dir)), flush=True)
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
        os._exit(1)
