"""Owns the memory that batches are decoded into: used again as soon as nobody holds it."""

import weakref

import numpy as np
import torch


class Buffers:
    """uint8 arrays of one shape. Fresh memory for every batch would cost a page fault for each 4 KiB decoded."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._free: list[np.ndarray] = []

    def take(self) -> torch.Tensor:
        """A tensor of the shape, with any content; its memory returns here with the last view of it."""
        if torch.utils.data.get_worker_info() is not None:
            # The parent maps these pages as they are; a tensor of other memory would be copied on its way.
            storage = torch.UntypedStorage._new_shared(int(np.prod(self.shape)))
            return torch.empty(0, dtype=torch.uint8).set_(storage).reshape(self.shape)
        memory = self._free.pop() if self._free else np.empty(self.shape, dtype=np.uint8)
        lease = memory.view()  # the tensor's storage holds the lease, whatever views are made of the tensor
        weakref.finalize(lease, self._free.append, memory).atexit = False
        return torch.from_numpy(lease)
