"""Times the first forward pass of a step: the part that a rank does alone, before it waits for other ranks."""

import time

import torch


class ForwardClock:
    """Measures with the host's clock on a CPU, with the device's on CUDA, which runs behind the host.

    Under ZeRO-3 the time includes the gathering of parameters.

    Attributes:
        started: when the step began, by `time.perf_counter`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._stopped = 0.0
        self.started = 0.0

    def start(self) -> None:
        """Notes that the step's first forward pass begins."""
        self.started = time.perf_counter()
        if self._on_cuda:
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self) -> None:
        """Notes that it has ended."""
        self._stopped = time.perf_counter()
        if self._on_cuda:
            self._events[1].record()

    def seconds(self) -> float:
        """The time of the last step. The step must be over, so that this waits for nothing."""
        if not self._on_cuda:
            return self._stopped - self.started
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000
