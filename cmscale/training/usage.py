"""Measures how much of the hardware training uses: its share of the peak rate (MFU), and the peak of memory."""

import resource

import torch

from cmscale.config import Config
from cmscale.distributed.world import World
from cmscale.engine.settings import COMPUTE_DTYPES
from cmscale.training.estimate.counts import image_flop

SIDE = 8192  # of the matrices whose product measures a GPU's rate
PRODUCTS = 10


class Usage:
    """Usage of the ranks' devices, for rank 0's log.

    The peak rate is `engine.peak_tflops`; without it a GPU's is measured once by a dense matrix product in the compute
    dtype, and on a CPU there is no MFU.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._device = world.device
        self._flop: float | None = None
        peak = config.engine.peak_tflops
        if not world.is_main or (peak is None and self._device.type != "cuda"):
            return
        if peak is None:
            peak = dense_rate(self._device, COMPUTE_DTYPES[config.engine.precision]) / 1e12
        self._peak = peak * 1e12 * world.num_ranks
        self._flop = image_flop(config)  # without what checkpointing computes again

    def of(self, images_per_second: float) -> dict[str, float]:
        """What is logged beside a speed: `mfu`, `peak_memory_gib` of rank 0's device or process."""
        found = {"peak_memory_gib": round(peak_memory(self._device) / 2**30, 3)}
        if self._flop is None:
            return found
        return {"mfu": round(images_per_second * self._flop / self._peak, 4), **found}


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that was allocated, on a CPU the most that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dense_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of dense matrix products on a GPU."""
    left, right = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(PRODUCTS):
        torch.mm(left, right)
    ended.record()
    ended.synchronize()
    return 2 * SIDE**3 * PRODUCTS / (began.elapsed_time(ended) / 1000)
