"""Owns the time of a step's first forward pass: what a rank does by itself, before it waits for the others."""

import time

import torch


class ForwardClock:
    """Reads the host's clock, or on CUDA the device's, which runs behind the host. (ZeRO-3 gathers on the way.)"""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._stopped = 0.0
        self.started = 0.0
        """When, by `time.perf_counter`, the step began."""

    def start(self) -> None:
        self.started = time.perf_counter()
        if self._on_cuda:
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self) -> None:
        self._stopped = time.perf_counter()
        if self._on_cuda:
            self._events[1].record()

    def seconds(self) -> float:
        """Of the last step, which must be over: then nothing is waited for."""
        if not self._on_cuda:
            return self._stopped - self.started
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000
