"""Tells whether a machine has a driver of GPUs, without torch."""

import ctypes
from pathlib import Path

from cmscale.errors import UserError


def refuse_cuda_without_driver(device: str | None, *, option: str = "--device ") -> None:
    """Refuses a device that torch could not find either: CUDA has no device where its driver's library is not.

    With the driver, torch decides. ROCm, which torch calls CUDA, needs its own driver.

    Raises:
        UserError: `cuda` is asked for, and there is no driver.
    """
    if device == "cuda" and not _has_driver():
        raise UserError(f"{option}cuda: this machine has no CUDA device; use {option}cpu")


def _has_driver() -> bool:
    if Path("/dev/kfd").exists():  # ROCm
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
