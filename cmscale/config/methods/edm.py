"""EDM: a diffusion model, the teacher of distillations (Karras et al. 2022)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cmscale.config.methods.base import (
    UNPUBLISHED_SECOND_TIME,
    DistanceSettings,
    MethodFacts,
    MethodSchedule,
    OnSigma,
    SecondTime,
    WithoutTeacher,
)
from cmscale.config.section import Positive


class EDM(WithoutTeacher, OnSigma):
    """A diffusion model after Karras et al. 2022."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="EDM diffusion model",
        description="a diffusion model (EDM, Karras et al. 2022)",
        is_consistency_model=False,
        can_teach=True,
        has_target=False,
        follows_teacher=False,
        learns_weighting=False,
        needs_forward_mode=False,
        preconditioning="edm",
        sampler="ode",
        boundary_at_zero=False,
        depends_on_total_steps=False,
    )

    kind: Literal["edm"]
    p_mean: float = -1.2
    p_std: Positive = 1.2
    sampler_steps: Annotated[int, Field(ge=2)] = Field(40, json_schema_extra={"operational": True})

    @property
    def distance_settings(self) -> DistanceSettings:
        return DistanceSettings(name="l2")

    @property
    def forward_passes(self) -> float:
        return 3

    @property
    def final_num_scales(self) -> None:
        return None

    @property
    def default_sampling_steps(self) -> int:
        return self.sampler_steps

    @property
    def second_time(self) -> SecondTime:
        return UNPUBLISHED_SECOND_TIME

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        del step, total_steps
        return MethodSchedule()
