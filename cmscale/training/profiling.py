"""Records the steps of `train.profile_steps`: a trace for a viewer, and a table of the dearest operators."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from cmscale.config import Config
from cmscale.distributed.world import World
from cmscale.io.durable import replace_durably
from cmscale.io.remarks import dispensable
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event

DEAREST = 10


class Profiler:
    """Profiles the chosen steps on rank 0; on other ranks, and without chosen steps, it does nothing."""

    def __init__(self, config: Config, run: RunDir, world: World) -> None:
        chosen = config.train.profiled
        self._first, self._last = chosen if chosen is not None and world.is_main else (0, 0)
        self._run = run
        self._device = world.device
        self._recorded: Any = None
        self._stack = contextlib.ExitStack()

    def begin(self, step: int) -> None:
        """Call before step number `step` (1 is the first)."""
        if step == self._first and self._recorded is None:
            self._recorded = self._stack.enter_context(recording(self._device))

    def end(self, step: int) -> None:
        """Call after that step."""
        if self._recorded is not None and step >= self._last:
            self.close()

    def close(self) -> None:
        """Ends the recording, if there is one, and writes what it has."""
        if self._recorded is None:
            return
        recorded, self._recorded = self._recorded, None
        self._stack.close()
        with dispensable("the profile"):
            self._write(recorded)

    def _write(self, recorded: Any) -> None:
        trace, operators = self._run.profile_trace(self._first), self._run.profile_table(self._first)
        trace.parent.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(trace))
        replace_durably(operators, table(recorded).encode())
        why = f"{trace.relative_to(self._run.root)}, {operators.relative_to(self._run.root)}"
        write_event(self._run, "profiled", step=self._last, rank=0, why=why)


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[Any]:
    """Profiles the block; what it yields has the result after the block."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        yield recorded
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def table(recorded: Any) -> str:
    """The dearest operators by their own time, of the device if it has any."""
    averages = recorded.key_averages()
    on_device = any(getattr(event, "self_device_time_total", 0) for event in averages)
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    return averages.table(sort_by=order, row_limit=DEAREST, max_name_column_width=60) + "\n"
