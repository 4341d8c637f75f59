"""Recycles the memory that batches are decoded into."""

import weakref

import numpy as np
import torch


class Buffers:
    """uint8 arrays of one shape, used again. New memory for every batch would cost a page fault per 4 KiB decoded."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._free: list[np.ndarray] = []

    def take(self) -> torch.Tensor:
        """A tensor of the shape with undefined content. Its memory returns here when the last view of it is gone."""
        if torch.utils.data.get_worker_info() is not None:
            # The parent process maps this memory; a tensor in other memory would be copied when it is sent.
            storage = torch.UntypedStorage._new_shared(int(np.prod(self.shape)))
            return torch.empty(0, dtype=torch.uint8).set_(storage).reshape(self.shape)
        memory = self._free.pop() if self._free else np.empty(self.shape, dtype=np.uint8)
        lease = memory.view()  # kept alive by the tensor's storage, and so by every view of the tensor
        weakref.finalize(lease, self._free.append, memory).atexit = False
        return torch.from_numpy(lease)
