"""Defines the interface of a loss, what it measures, and how losses draw neighbouring times."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from cmscale.config.methods import MethodSection
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.networks import Networks
from cmscale.rng import SampleRandomness

Measure = Callable[[str, Tensor], None]
"""(name, values [B]): a quantity that a loss computes besides its value, for the log."""


def unmeasured(name: str, values: Tensor) -> None:
    """Drops what a loss measures."""
    del name, values


class Loss(Protocol):
    """(networks, clean [B, C, H, W] in [-1, 1], scheduled values, randomness) -> loss per sample [B], float32."""

    def __call__(
        self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness
    ) -> Tensor: ...


def uniform_neighbours(
    method: MethodSection, values: ScheduleValues, random: SampleRandomness
) -> tuple[Tensor, Tensor]:
    """(t_n, t_{n+1}), each [B] float64, with n uniform on 1..N-1; Consistency Models, algorithms 2 and 3."""
    assert values.num_scales is not None
    index = grid.uniform_index(random.uniform(), values.num_scales)
    return grid.neighbours(method, index, values.num_scales)
