"""Gives what changes with the step (learning rate, N(k), mu(k), curricula) as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import assert_never

from cmscale.config.methods import Method
from cmscale.config.models import Config
from cmscale.config.sections import Optimizer, Train


@dataclass(frozen=True)
class ScheduleValues:
    """The scheduled values of one step; None for a quantity that the method does not have.

    Attributes:
        num_scales: N(k), the size of the time grid.
        target_ema: mu(k), the decay rate of the target network.
        stage: Stage of a curriculum, from 0.
        ends_stage: Whether optimizer and averages start again after this step.
        sampling_steps: Steps in which the model is sampled at this step, if not in its default number.
    """

    step: int
    learning_rate: float
    num_scales: int | None = None
    target_ema: float | None = None
    stage: int | None = None
    ends_stage: bool = False
    sampling_steps: int | None = None


def at(config: Config, step: int) -> ScheduleValues:
    """The schedules of a run at `step` (0 is the first step); the papers' K is that of the method's schedule."""
    rate = learning_rate(config.optimizer, step, total_steps=config.train.total_steps)
    return for_method(config.method, step, learning_rate=rate, total_steps=config.train.total_steps)


def for_method(method: Method, step: int, *, learning_rate: float, total_steps: int) -> ScheduleValues:
    """The schedules of a method at `step`; `learning_rate` is the optimizer's before the method's factor.

    Args:
        total_steps: The run's; the method's own `schedule_steps` replaces it.
    """
    scheduled = method.schedule(step, total_steps=method.schedule_length(total_steps))
    return ScheduleValues(
        step,
        learning_rate * scheduled.learning_rate_factor,
        num_scales=scheduled.num_scales,
        target_ema=scheduled.target_ema,
        stage=scheduled.stage,
        ends_stage=scheduled.ends_stage,
        sampling_steps=scheduled.sampling_steps,
    )


def learning_rate(optimizer: Optimizer, step: int, *, total_steps: int | None = None) -> float:
    """The optimizer's learning rate: its decay, after a linear warm-up in which step k has (k + 1) / warmup_steps."""
    rate = optimizer.learning_rate * decay(optimizer, step, total_steps=total_steps)
    if step >= optimizer.warmup_steps:
        return rate
    return rate * (step + 1) / optimizer.warmup_steps


def decay(optimizer: Optimizer, step: int, *, total_steps: int | None = None) -> float:
    """The factor of `optimizer.schedule` at `step` (0 is the first, with 1); `cosine` needs a length."""
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "inverse_square_root":
            assert optimizer.decay_reference is not None
            return 1 / math.sqrt(max(step / optimizer.decay_reference, 1.0))
        case "cosine":
            length = optimizer.decay_reference or total_steps
            assert length is not None
            return (1 + math.cos(math.pi * min(step / length, 1.0))) / 2
        case "step":
            assert optimizer.decay_factor is not None
            return optimizer.decay_factor ** sum(step >= each for each in optimizer.decay_steps)
    assert_never(optimizer.schedule)


def is_logged(train: Train, step: int) -> bool:
    """Whether the metrics of applied step number `step` (1 is the first) are logged."""
    return step == 1 or is_due(step, train.log_every, train.total_steps)


def is_due(step: int, every: int, last: int) -> bool:
    """Whether work that is done every `every` steps (0: never) and after the last step is due after `step`."""
    return every > 0 and (step % every == 0 or step == last)
