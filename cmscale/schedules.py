"""Owns what changes with the step: N(k), mu(k), curricula and the learning rate, as pure functions of the step."""

import math
from dataclasses import dataclass

from cmscale.config import Config


@dataclass(frozen=True)
class Point:
    """What the schedules say at one step."""

    step: int
    learning_rate: float
    num_scales: int | None = None  # N(k), None for methods without a grid
    target_ema: float | None = None  # mu(k), None for methods without a target network
    stage: int | None = None  # ECT's curriculum
