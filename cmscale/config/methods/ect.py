"""ECT: easy consistency tuning of a diffusion model (Geng et al. 2024), with its curriculum.

The defaults are the authors' for CIFAR-10, except huber_c, which is 0 there. For ImageNet 64 they take weighting edm,
p_mean -0.8, p_std 1.6, q 4, num_stages 4 and huber_c 0.06.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cmscale.config.methods.base import (
    DistanceSettings,
    MethodFacts,
    MethodSchedule,
    OnSigma,
    SampledInOneStep,
    SecondTime,
    TeacherChoice,
    WithoutForwardMode,
)
from cmscale.config.section import Count, Positive, operational


class ECT(OnSigma, SampledInOneStep, WithoutForwardMode):
    """Easy consistency tuning (Geng et al. 2024), from a diffusion model."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Easy consistency tuning",
        description="a consistency model by easy consistency tuning (ECT, Geng et al. 2024)",
        is_consistency_model=True,
        can_teach=False,
        has_target=False,
        follows_teacher=False,
        learns_weighting=False,
        preconditioning="edm",  # times go below sigma_min, and a new student equals the diffusion model
        sampler="multistep",
        boundary_at_zero=True,
        depends_on_total_steps=True,
    )

    kind: Literal["ect"]
    teacher: str = operational(...)
    teacher_weights: str | None = None
    p_mean: float = -1.1
    p_std: Positive = 2.0
    weighting: Literal["inverse_gap", "edm"] = "inverse_gap"
    q: Annotated[float, Field(gt=1)] = 2.0
    k: Positive = 8.0
    b: Positive = 1.0
    num_stages: Count = 8
    huber_c: Annotated[float, Field(ge=0)] | None = None

    @property
    def teacher_choice(self) -> TeacherChoice:
        return TeacherChoice(self.teacher, self.teacher_weights)

    @property
    def distance_settings(self) -> DistanceSettings:
        return DistanceSettings(name="pseudo_huber", huber_c=self.huber_c)

    @property
    def forward_passes(self) -> float:
        """Student forward and backward, and once more without gradient."""
        return 4

    @property
    def final_num_scales(self) -> None:
        return None

    @property
    def second_time(self) -> SecondTime:
        """0.821, the released code's for CIFAR-10; 1.526, its for ImageNet 64, with that recipe's weighting."""
        return SecondTime(index=75, last=150, sigma=1.526 if self.weighting == "edm" else 0.821)

    @property
    def smallest_gap(self) -> float:
        """That of the last stage at large times, where r / t = 1 - q^-num_stages."""
        return -math.log1p(-(self.q**-self.num_stages))

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        return MethodSchedule(stage=ect_stage(step, total_steps=total_steps, num_stages=self.num_stages))


def ect_stage(step: int, *, total_steps: int, num_stages: int) -> int:
    """The stage of ECT's curriculum, 0 to num_stages - 1; stages are equal parts of training."""
    return min(step * num_stages // total_steps, num_stages - 1)
