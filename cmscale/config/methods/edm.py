"""EDM: a diffusion model, the teacher of distillations (Karras et al. 2022)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cmscale.config.methods.base import (
    MOST_STEPS,
    UNPUBLISHED_SECOND_TIME,
    DistanceSettings,
    MethodFacts,
    MethodSchedule,
    SecondTime,
    TimeEmbedding,
)
from cmscale.config.methods.shared import WithoutForwardMode, WithoutTeacher
from cmscale.config.section import Positive, key, operational


class EDM(WithoutTeacher, WithoutForwardMode):
    """A diffusion model after Karras et al. 2022."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="EDM diffusion model",
        description="a diffusion model (EDM, Karras et al. 2022)",
        paper="https://arxiv.org/abs/2206.00364",
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
    p_mean: float = key(-1.2, "Mean of ln sigma, the logarithm of the noise levels of training.", source="EDM, table 1")
    p_std: Positive = key(1.2, "Standard deviation of ln sigma.", source="EDM, table 1")
    time_embedding: TimeEmbedding = key(
        "log_sigma",
        "What the time embedding gets: 250 ln(sigma), or the angle atan(sigma / sigma_data), which teachers of scd and "
        "sct need for method.tangent: jvp.",
        source="the released teachers",
    )
    sampler_steps: Annotated[int, Field(ge=2, le=MOST_STEPS)] = operational(
        40, "Steps of Heun's solver unless a command says otherwise; n steps evaluate the network 2 n - 1 times."
    )

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
