"""Keeps what a program has set in torch away from samples and edits, which depend on their arguments alone."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_lock = threading.Lock()
_before: list[torch.dtype] = []  # what each block has found that has not ended; the first found the program's


@contextmanager
def own_surroundings() -> Iterator[None]:
    """Runs a block, or a function that it decorates, as if the program around had set nothing in torch.

    A default device or dtype, autocast, `torch.no_grad` and `torch.inference_mode` have no effect inside. Under the
    last, tensors would be made that can't be used outside of it, such as those of a network that is kept. Which kernels
    torch uses is left to the program: its threads, TF32 and deterministic algorithms.

    A process that was forked after such a block computes with one thread, as workers of torch's DataLoader do: it has
    none of the threads that were started before, and would wait for them for ever.
    """
    if _first_process() != os.getpid():
        torch.set_num_threads(1)
    with (
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.inference_mode(False),  # turns gradients on, too: `interpolate` needs them to find the noise of images
        _default_dtype(torch.float32),
    ):
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets the type of tensors that name none. All threads share it: the last block that ends sets it back."""
    with _lock:
        _before.append(torch.get_default_dtype())
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        with _lock:
            was = _before.pop()
            if not _before:
                torch.set_default_dtype(was)


@cache
def _first_process() -> int:
    """The process that computed first: this one, or one that it was forked from."""
    return os.getpid()
