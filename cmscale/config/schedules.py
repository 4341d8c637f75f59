"""Gives what changes with the step (learning rate, N(k), mu(k), curricula) as pure functions of the step."""

from dataclasses import dataclass

from cmscale.config.methods import Method
from cmscale.config.models import Config, Optimizer


@dataclass(frozen=True)
class ScheduleValues:
    """The scheduled values of one step; None for a quantity that the method does not have.

    Attributes:
        num_scales: N(k), the size of the time grid.
        target_ema: mu(k), the decay rate of the target network.
        stage: Stage of a curriculum, from 0.
        ends_stage: Whether optimizer and averages start again after this step.
    """

    step: int
    learning_rate: float
    num_scales: int | None = None
    target_ema: float | None = None
    stage: int | None = None
    ends_stage: bool = False


def at(config: Config, step: int) -> ScheduleValues:
    """The schedules of a run at `step` (0 is the first step); the papers' K is train.total_steps."""
    rate = learning_rate(config.optimizer, step)
    return for_method(config.method, step, learning_rate=rate, total_steps=config.train.total_steps)


def for_method(method: Method, step: int, *, learning_rate: float, total_steps: int) -> ScheduleValues:
    """The schedules of a method at `step`; `learning_rate` is the optimizer's before the method's factor."""
    scheduled = method.schedule(step, total_steps=total_steps)
    return ScheduleValues(
        step,
        learning_rate * scheduled.learning_rate_factor,
        num_scales=scheduled.num_scales,
        target_ema=scheduled.target_ema,
        stage=scheduled.stage,
        ends_stage=scheduled.ends_stage,
    )


def learning_rate(optimizer: Optimizer, step: int) -> float:
    """The optimizer's learning rate, after a linear warm-up in which step k has (k + 1) / warmup_steps of it."""
    if step >= optimizer.warmup_steps:
        return optimizer.learning_rate
    return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps


def is_due(step: int, every: int, last: int) -> bool:
    """Whether work that is done every `every` steps (0: never) and after the last step is due after `step`."""
    return every > 0 and (step % every == 0 or step == last)
