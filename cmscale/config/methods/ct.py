"""CT: consistency training from scratch (Song et al. 2023, algorithm 3), with its schedules N(k) and mu(k).

N(k) is computed in integer arithmetic, so that rounding can't move the step at which it changes.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cmscale.config.methods.base import MethodFacts, MethodSchedule, Scheduled, SecondTime
from cmscale.config.methods.shared import (
    ChosenDistance,
    OnSigma,
    SampledInOneStep,
    WithoutForwardMode,
    WithoutTeacher,
    check_scales,
)
from cmscale.config.section import key

Convention = Literal["paper", "released_code"]


class CT(Scheduled, WithoutTeacher, ChosenDistance, OnSigma, SampledInOneStep, WithoutForwardMode):
    """Consistency training (algorithm 3)."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Consistency training",
        description="a consistency model trained from scratch (CT, Song et al. 2023, algorithm 3)",
        paper="https://arxiv.org/abs/2303.01469",
        is_consistency_model=True,
        can_teach=False,
        has_target=True,
        follows_teacher=False,
        learns_weighting=False,
        preconditioning="consistency",
        sampler="multistep",
        boundary_at_zero=False,
        depends_on_total_steps=True,
    )

    kind: Literal["ct"]
    s0: Annotated[int, Field(ge=2)] = key(
        2, "N(k), the number of times of the grid, starts at s0.", source="Consistency Models, LSUN 256"
    )
    s1: Annotated[int, Field(ge=2)] = key(
        150, "N(k) grows with the square root of the step up to s1 + 1.", source="Consistency Models, LSUN 256"
    )
    mu0: Annotated[float, Field(ge=0, lt=1)] = key(
        0.95,
        "Decay rate of the target network while N(k) is s0, from which mu(k) follows; 0: the target is the student.",
        source="Consistency Models, LSUN 256",
    )
    convention: Convention = key(
        "paper",
        "Whether mu(k) divides by N(k), as in the paper, or by N(k) - 1, as in its released code.",
        source="Consistency Models, appendix C",
    )
    weighting: Literal["uniform", "inverse_gap"] = key(
        "uniform",
        "Factor of the loss of neighbouring times: 1, or iCT's 1 / (t_{n+1} - t_n).",
        source="Consistency Models",
    )

    @model_validator(mode="after")
    def _check_growth(self) -> "CT":
        check_scales(self.s0, self.s1)
        return self

    @property
    def forward_passes(self) -> float:
        """Student forward and backward, target."""
        return 4

    @property
    def final_num_scales(self) -> int:
        return self.s1 + 1

    @property
    def second_time(self) -> SecondTime:
        """On LSUN Bedroom: 67 of 150 (Song et al. 2023, appendix C)."""
        return SecondTime(index=67, last=150)

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        scales = ct_num_scales(step, total_steps=total_steps, s0=self.s0, s1=self.s1)
        decay = ct_target_ema(scales, s0=self.s0, mu0=self.mu0, convention=self.convention)
        return MethodSchedule(num_scales=scales, target_ema=decay)


def ct_num_scales(step: int, *, total_steps: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1; Consistency Models, appendix C.

    Computed as the smallest n with K n^2 >= k ((s1+1)^2 - s0^2) + K s0^2. Steps beyond the last stay at s1 + 1.
    """
    step = min(step, total_steps)
    numerator = step * ((s1 + 1) ** 2 - s0**2) + total_steps * s0**2
    square = -(-numerator // total_steps)
    return math.isqrt(square - 1) + 1


def ct_target_ema(num_scales: int, *, s0: int, mu0: float, convention: Convention) -> float:
    """mu(k) = exp(s0 ln(mu0) / N(k)); Consistency Models, appendix C. The released code divides by N(k) - 1.

    With mu0 = 0 there is no average: the target is the student (iCT, section 3.2).
    """
    divisor = num_scales if convention == "paper" else num_scales - 1
    return math.exp(s0 * math.log(mu0) / divisor) if mu0 else 0.0
