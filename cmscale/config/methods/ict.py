"""iCT: improved consistency training (Song and Dhariwal 2023), with its doubling schedule N(k)."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cmscale.config.methods.base import UNPUBLISHED_SECOND_TIME, MethodFacts, MethodSchedule, Scheduled, SecondTime
from cmscale.config.methods.shared import (
    OnSigma,
    PseudoHuber,
    SampledInOneStep,
    WithoutForwardMode,
    WithoutTeacher,
    check_scales,
)
from cmscale.config.section import Positive, key


class ICT(Scheduled, WithoutTeacher, PseudoHuber, OnSigma, SampledInOneStep, WithoutForwardMode):
    """Improved consistency training (Song and Dhariwal 2023)."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Improved consistency training",
        description="a consistency model by improved consistency training (iCT, Song and Dhariwal 2023)",
        paper="https://arxiv.org/abs/2310.14189",
        is_consistency_model=True,
        can_teach=False,
        has_target=False,
        follows_teacher=False,
        learns_weighting=False,
        preconditioning="consistency",
        sampler="multistep",
        boundary_at_zero=False,
        depends_on_total_steps=True,
    )

    kind: Literal["ict"]
    s0: Annotated[int, Field(ge=2)] = key(10, "N(k) starts at s0 + 1.", source="iCT, section 3.4")
    s1: Annotated[int, Field(ge=2)] = key(1280, "N(k) doubles up to s1 + 1.", source="iCT, section 3.4")
    p_mean: float = key(-1.1, "Mean of ln t, the logarithm of the times of training.", source="iCT, section 3.5")
    p_std: Positive = key(2.0, "Standard deviation of ln t.", source="iCT, section 3.5")

    @model_validator(mode="after")
    def _check_growth(self) -> "ICT":
        check_scales(self.s0, self.s1)
        return self

    @property
    def forward_passes(self) -> float:
        """Student forward and backward, and once more without gradient."""
        return 4

    @property
    def final_num_scales(self) -> int:
        return self.s1 + 1

    @property
    def second_time(self) -> SecondTime:
        return UNPUBLISHED_SECOND_TIME

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        return MethodSchedule(num_scales=ict_num_scales(step, total_steps=total_steps, s0=self.s0, s1=self.s1))


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
