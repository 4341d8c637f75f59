"""EDM: a diffusion model, the teacher of distillations (Karras et al. 2022)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cmscale.config.methods.base import (
    UNPUBLISHED_SECOND_TIME,
    DistanceSettings,
    MethodFacts,
    MethodSchedule,
    SecondTime,
    TimeEmbedding,
    WithoutForwardMode,
    WithoutTeacher,
)
from cmscale.config.section import Positive


class EDM(WithoutTeacher, WithoutForwardMode):
    """A diffusion model after Karras et al. 2022."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="EDM diffusion model",
        description="a diffusion model (EDM, Karras et al. 2022)",
        is_consistency_model=False,
        can_teach=True,
        has_target=False,
        follows_teacher=False,
        learns_weighting=False,
        preconditioning="edm",
        sampler="ode",
        boundary_at_zero=False,
        depends_on_total_steps=False,
    )

    kind: Literal["edm"]
    p_mean: float = -1.2
    p_std: Positive = 1.2
    time_embedding: TimeEmbedding = "log_sigma"
    sampler_steps: Annotated[int, Field(ge=2)] = Field(40, json_schema_extra={"operational": True})

    @property
    def embeds_angle(self) -> bool:
        """A teacher of sCD and sCT that embeds the angle t can be differentiated in time (sCM, section 4.1)."""
        return self.time_embedding == "angle"

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
