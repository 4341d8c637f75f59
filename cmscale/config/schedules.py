"""Owns what changes with the step: N(k), mu(k), curricula, the learning rate: pure functions of the step.

Integers are computed in integer arithmetic, so that no rounding moves a boundary between two values of N(k).
"""

import math
from dataclasses import dataclass

from cmscale.config import CD, CT, ECT, ICT, PD, Config, Convention, Method, Optimizer


@dataclass(frozen=True)
class Point:
    """What the schedules say at one step."""

    step: int
    learning_rate: float
    num_scales: int | None = None  # N(k), None for methods without a grid
    target_ema: float | None = None  # mu(k), None for methods without a target network
    stage: int | None = None  # ECT's curriculum


def at(config: Config, step: int) -> Point:
    """The schedules of a run at `step` (0 is the first step); K of the papers is train.total_steps."""
    rate = learning_rate(config.optimizer, step)
    return of_method(config.method, Point(step, rate), total_steps=config.train.total_steps)


def of_method(method: Method, point: Point, *, total_steps: int) -> Point:
    """`point` with what its method schedules."""
    step, rate = point.step, point.learning_rate
    match method:
        case CD():
            return Point(step, rate, num_scales=method.num_scales, target_ema=method.target_ema)
        case CT():
            scales = ct_num_scales(step, total_steps=total_steps, s0=method.s0, s1=method.s1)
            decay = ct_target_ema(scales, s0=method.s0, mu0=method.mu0, convention=method.convention)
            return Point(step, rate, num_scales=scales, target_ema=decay)
        case ICT():
            scales = ict_num_scales(step, total_steps=total_steps, s0=method.s0, s1=method.s1)
            return Point(step, rate, num_scales=scales)
        case ECT():
            return Point(step, rate, stage=ect_stage(step, total_steps=total_steps, num_stages=method.num_stages))
        case PD():
            scales, behind = pd_stage(step, total_steps=total_steps, start_scales=method.start_scales)
            after, _ = pd_stage(step + 1, total_steps=total_steps, start_scales=method.start_scales)
            return Point(step, rate * (1 - behind), num_scales=scales, target_ema=1.0 if after == scales else 0.0)
        case _:
            return point


def learning_rate(optimizer: Optimizer, step: int) -> float:
    """Constant, after a linear warm-up whose first step already moves: rate (k + 1) / warmup_steps."""
    if step >= optimizer.warmup_steps:
        return optimizer.learning_rate
    return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps


def ct_num_scales(step: int, *, total_steps: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1; Consistency Models, appendix C.

    The smallest n with K n^2 >= k ((s1+1)^2 - s0^2) + K s0^2. Steps beyond the last stay at s1 + 1.
    """
    step = min(step, total_steps)
    numerator = step * ((s1 + 1) ** 2 - s0**2) + total_steps * s0**2
    square = -(-numerator // total_steps)
    return math.isqrt(square - 1) + 1


def ct_target_ema(num_scales: int, *, s0: int, mu0: float, convention: Convention) -> float:
    """mu(k) = exp(s0 ln(mu0) / N(k)); Consistency Models, appendix C. Released code: / (N(k) - 1).

    mu0 = 0 is no average at all: the target is the student (iCT, section 3.2).
    """
    divisor = num_scales if convention == "paper" else num_scales - 1
    return math.exp(s0 * math.log(mu0) / divisor) if mu0 else 0.0


def ict_num_scales(step: int, *, total_steps: int, s0: int, s1: int) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = floor(K / (log2 floor(s1/s0) + 1)); iCT, section 3.4."""
    ratio = s1 // s0
    doublings = ratio.bit_length() - 1
    if ratio == 1 << doublings:
        length = total_steps // (doublings + 1)
    else:
        length = math.floor(total_steps / (math.log2(ratio) + 1))
    stage = min(step // max(length, 1), doublings + 1)
    return min(s0 << stage, s1) + 1


def ect_stage(step: int, *, total_steps: int, num_stages: int) -> int:
    """The stage of ECT's curriculum, 0 to num_stages - 1, each an equal part of training."""
    return min(step * num_stages // total_steps, num_stages - 1)


def pd_stage(step: int, *, total_steps: int, start_scales: int) -> tuple[int, float]:
    """N of progressive distillation, and the part of its stage that lies behind, in which the learning rate falls to 0.

    N is start_scales, halved stage by stage down to 1 (Salimans and Ho 2022, algorithm 2). The stages of N = 2 and 1
    are twice as long as the others, as the released consistency code has them.
    """
    stages = start_scales.bit_length()
    lengths = [1] * max(stages - 2, 0) + [2] * min(stages, 2)
    place = min(step, total_steps - 1) * sum(lengths)  # in units of 1 / total_steps of a length
    for stage, length in enumerate(lengths):
        if place < length * total_steps:
            return start_scales >> stage, place / (length * total_steps)
        place -= length * total_steps
    raise AssertionError((step, total_steps))


def tangent_ratio(step: int, *, warmup_steps: int) -> float:
    """r = min(1, k / H), the tangent warm-up; sCM, section 4.2."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps (0: never), and at the last, is to be done after this step."""
    return every > 0 and (step % every == 0 or step == last)
