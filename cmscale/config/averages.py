"""Defines the averages of the weights that training keeps: exponential ones, and those by a power function.

An average by a power function weights the master weights of step s by (s/t)^gamma (Karras et al. 2024, section 3.1).
Its length is its standard deviation relative to t, so that one length fits a run of any number of steps.
"""

import math
import re
from typing import Annotated

from pydantic import Field, model_validator

from cmscale.config.section import AsTuple, NonNegative, Rate, Section, key, operational

SHORTEST, LONGEST = 0.005, 0.28
"""Of the lengths: with gamma = 0, the mean of all steps, the length is 1/sqrt(12) = 0.2887."""
Length = Annotated[float, Field(ge=SHORTEST, le=LONGEST)]
_NAME = re.compile(r"power_(0\.\d{1,7})")


class EMA(Section):
    """Averages of the weights, for sampling; every command uses the first of `rates` by default."""

    rates: Annotated[tuple[Rate, ...], AsTuple, Field(min_length=1)] = key(
        (0.999943,),
        "Decay rate per step of each exponential average. An average is named by its rate, such as ema_0.999943.",
        source="Consistency Models, appendix C",
    )
    lengths: Annotated[tuple[Length, ...], AsTuple] = key(
        (),
        "Averages by a power function, named power_0.05: their standard deviation relative to the steps so far. From "
        "two of them, such as 0.05 and 0.1, `cmscale ema` computes those of other lengths after training.",
        source="a choice of each run; Karras et al. 2024 keep 0.05 and 0.1",
    )
    snapshot_every: NonNegative = operational(
        0,
        "Steps between snapshots of these averages, which are kept beside the checkpoints and in checkpoint.export_to "
        "(4 bytes per parameter and average); a multiple of checkpoint.every_steps. 0: none.",
        unit="steps",
        source="a choice of each run",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the exponential averages."""
        return tuple(f"ema_{rate:.7g}" for rate in self.rates)

    @property
    def power_names(self) -> tuple[str, ...]:
        """The names of the averages by a power function."""
        return tuple(map(power_name, self.lengths))

    @model_validator(mode="after")
    def _distinct_names(self) -> "EMA":
        for name, given, names in (("rates", self.rates, self.names), ("lengths", self.lengths, self.power_names)):
            if len(set(names)) < len(names):
                raise ValueError(f"{name}: {list(given)} holds two that are equal to seven digits; remove one")
        if self.snapshot_every and not self.lengths:
            raise ValueError("snapshot_every: snapshots hold the averages of `lengths`, of which there are none")
        return self


def power_name(length: float) -> str:
    """`power_0.05`, the name of an average by a power function."""
    return f"power_{length:.7g}"


def length_of(name: str) -> float | None:
    """The length in the name of an average by a power function; None for other names."""
    named = _NAME.fullmatch(name)
    return float(named[1]) if named else None


def power_exponent(length: float) -> float:
    """gamma of a length s, from s^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3));
    Karras et al. 2024, section 3.1.

    The right side falls from 1/12 at gamma = 0, so that gamma is found by halving an interval.
    """
    low, high = 0.0, 1 / length  # (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) < 1 / gamma^2
    while (middle := (low + high) / 2) not in (low, high):
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > length**2:
            low = middle
        else:
            high = middle
    return middle


def power_rate(exponent: float, step: int) -> float:
    """beta = (1 - 1/t)^(gamma + 1), the decay rate at applied step t (1 is the first); Karras et al. 2024, section 3.1.

    The weight of step s at step t is then (s^(gamma + 1) - (s - 1)^(gamma + 1)) / t^(gamma + 1), without error.
    """
    return math.exp((exponent + 1) * math.log1p(-1 / step)) if step > 1 else 0.0
