"""Computes how long a run takes on many GPUs: step, days, and what interruptions cost (Young 1974, Daly 2006)."""

import math
from dataclasses import dataclass

from cmscale.config import Config, accumulation_steps
from cmscale.errors import UserError
from cmscale.training.estimate.memory import BYTES

DAY = 86400.0


@dataclass(frozen=True)
class Rates:
    """What is measured or assumed of a cluster.

    Attributes:
        tflops: TFLOP/s that a GPU sustains on the network.
        network: GB/s that a GPU sends to others.
        interruption_hours: GPU-hours between two interruptions.
        save_seconds: By which a save delays training.
        restart_seconds: From an interruption to the first new step.
    """

    tflops: float
    network: float
    interruption_hours: float
    save_seconds: float
    restart_seconds: float


def sent_bytes(config: Config, *, num_ranks: int, count: int) -> float:
    """Bytes that a rank sends per step, all-reduces as rings: fp32 gradients, new weights, the target's weights.

    Stages 2 and 3 reduce the gradients of every micro-batch; stages 0 and 1 those of the whole step.
    """
    stage, low, facts = config.engine.zero_stage, BYTES[config.engine.precision], config.method.facts
    accumulation = accumulation_steps(config, num_ranks=num_ranks)
    share = (num_ranks - 1) / num_ranks * count
    reduced = 2 * 4 * share * (accumulation if stage >= 2 else 1)
    if stage == 3:  # every network is gathered for every micro-batch; the student's forward serves its backward
        return reduced + low * share * (1 + facts.has_target + facts.follows_teacher) * accumulation
    return reduced + low * share * ((stage >= 1) + facts.has_target)


def step_seconds(config: Config, rates: Rates, *, num_ranks: int, image_flop: float, count: int) -> tuple[float, float]:
    """Seconds per step: if all communication overlaps computation, and if none does."""
    computed = config.train.global_batch_size * image_flop / (num_ranks * rates.tflops * 1e12)
    return computed, computed + sent_bytes(config, num_ranks=num_ranks, count=count) / (rates.network * 1e9)


def best_interval(save: float, between: float) -> float:
    """Seconds of training between two saves with the least loss; Daly 2006, equation 37.

    Args:
        save: Seconds by which a save delays training.
        between: Mean seconds between two interruptions.
    """
    if save >= 2 * between:
        return between
    ratio = save / (2 * between)
    return math.sqrt(2 * save * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def goodput(interval: float, *, save: float, restart: float, between: float) -> float:
    """The share of time in which training advances; Daly 2006, equation 20.

    Interruptions come at random, at a constant rate, also during saves and restarts.
    """
    exponent = (interval + save) / between
    if exponent > 700 or restart / between > 700:
        return 0.0
    return interval / (between * math.exp(restart / between) * math.expm1(exponent))


@dataclass(frozen=True)
class Scale:
    """A run on a number of GPUs.

    Attributes:
        seconds: Of a step: all communication overlapped, none overlapped.
        days: Without interruptions, for both.
        between: Mean seconds between two interruptions.
        best_steps: Steps between two saves with the least loss.
        best: The goodput then.
        configured: The goodput at `checkpoint.every_steps`.
    """

    num_ranks: int
    seconds: tuple[float, float]
    days: tuple[float, float]
    between: float
    best_steps: int
    best: float
    configured: float


def at_scale(config: Config, rates: Rates, *, num_ranks: int, image_flop: float, count: int) -> Scale | None:
    """The run on `num_ranks` GPUs; None if the global batch does not divide among them."""
    try:
        accumulation_steps(config, num_ranks=num_ranks)
    except UserError:
        return None
    seconds = step_seconds(config, rates, num_ranks=num_ranks, image_flop=image_flop, count=count)
    between = rates.interruption_hours * 3600 / num_ranks
    shares = {"save": rates.save_seconds, "restart": rates.restart_seconds, "between": between}
    best_steps = max(1, round(best_interval(rates.save_seconds, between) / seconds[1]))
    steps = config.train.total_steps
    return Scale(
        num_ranks=num_ranks,
        seconds=seconds,
        days=(steps * seconds[0] / DAY, steps * seconds[1] / DAY),
        between=between,
        best_steps=best_steps,
        best=goodput(best_steps * seconds[1], **shares),
        configured=goodput(config.checkpoint.every_steps * seconds[1], **shares),
    )


def kept_checkpoints(config: Config) -> int:
    """Checkpoints on disk at the end: the last ones, and the multiples of `checkpoint.keep_every`."""
    kept, steps = config.checkpoint, config.train.total_steps
    before = (steps - 1) // kept.every_steps * kept.every_steps  # the last save but the final one
    last = {steps, *(max(before - number * kept.every_steps, 0) for number in range(kept.keep_last - 1))} - {0}
    if not kept.keep_every:
        return len(last)
    both = math.lcm(kept.every_steps, kept.keep_every)
    is_multiple = steps % kept.keep_every == 0
    multiples = (steps - 1) // both + is_multiple
    return multiples + sum(step % kept.keep_every != 0 for step in last)
