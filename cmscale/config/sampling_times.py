"""Parses the lists of numbers that sampling takes, and checks times against a method's range. Imports no torch."""

import itertools
import math
from collections.abc import Sequence

from cmscale.config.methods.base import MOST_STEPS, MethodSection
from cmscale.errors import UserError

_LONGEST_STEP = 15  # digits: more are no step, and would be slow to convert


def is_file(text: str) -> bool:
    """Whether `--sampling-times` names the JSON file of a search, and no numbers."""
    return text.lower().endswith(".json")


def parse_times(text: str) -> tuple[float, ...]:
    """Descending times such as `80,4.4`.

    Raises:
        ValueError: not numbers, or they do not descend.
    """
    try:
        times = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"got {text!r}; write descending numbers such as 80,4.4, or give the JSON of search-times"
        ) from None
    check_descending(times, shown=repr(text))
    return times


def check_descending(times: Sequence[float], *, shown: str) -> None:
    """Raises ValueError unless the times are numbers that descend and are not negative."""
    finite = all(math.isfinite(time) for time in times)
    if not finite or not times or any(a <= b for a, b in itertools.pairwise(times)) or times[-1] < 0:
        raise ValueError(f"got {shown}; the times must descend and must not be negative")


def check_range(times: Sequence[float], method: MethodSection, *, label: str) -> None:
    """Checks that a network was trained at these times.

    Args:
        times: Descending. Those of an ODE sampler may end with 0.
        label: What the message begins with: `--sampling-times`.

    Raises:
        UserError: a time outside sigma_min to sigma_max, or the method has times of its own.
    """
    if method.only_sampling_steps is not None:
        raise UserError(f"{label}: the model has sampling times of its own, the ends of its segments; leave it out")
    ends_with_zero = method.facts.sampler == "ode" and len(times) > 1 and times[-1] == 0
    for time in times[:-1] if ends_with_zero else times:
        if not method.sigma_min <= time <= method.sigma_max:
            raise UserError(
                f"{label}: {time:g} is outside the model's times, {method.sigma_min:g} to {method.sigma_max:g}; "
                "give times in this range"
            )


def check_steps(method: MethodSection, steps: int) -> None:
    """Checks that a model can be sampled in a number of steps at the times that this number has by default.

    Raises:
        UserError: it was trained for another number, or two steps have no second time in its range of noise.
    """
    if steps > MOST_STEPS:
        raise UserError(
            f"--steps: got {steps}; give at most {MOST_STEPS}, as each step evaluates the network for all images"
        )
    only = method.only_sampling_steps
    if only is not None and steps != only:
        raise UserError(f"--steps: got {steps}, but the model was trained to be sampled in {only}; leave it out")
    second = method.second_time.sigma
    if steps == 2 and second is not None and not method.sigma_min <= second < method.sigma_max:
        raise UserError(
            f"two steps: the second time that was published for {method.facts.title}, {second:.4g}, is outside of "
            f"method.sigma_min {method.sigma_min:g} to sigma_max {method.sigma_max:g}; give --sampling-times, or set "
            "sampling.times"
        )


def parse_counts(text: str) -> tuple[int, ...]:
    """Numbers of sampling steps such as `1,2`. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) <= _LONGEST_STEP and int(part) >= 1 for part in parts):
        raise ValueError(f"got {text!r}; write whole numbers of at least 1, such as 1,2")
    counts = tuple(map(int, parts))
    if max(counts) > MOST_STEPS:
        raise ValueError(f"got {max(counts)} steps; at most {MOST_STEPS}, as each evaluates the network for all images")
    return counts


def parse_step(text: str) -> int | None:
    """A checkpoint's step; None for `latest`. Raises ValueError."""
    text = text.strip()
    if text == "latest":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _LONGEST_STEP):
        raise ValueError(f"got {text!r}; give a step number or latest")
    return int(text)
