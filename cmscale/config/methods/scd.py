"""sCD: continuous-time consistency distillation (Lu and Song 2024, algorithm 1)."""

from typing import ClassVar, Literal

from cmscale.config.methods.base import MethodFacts
from cmscale.config.methods.continuous import ContinuousTime
from cmscale.config.methods.shared import FollowsTeacher


class SCD(FollowsTeacher, ContinuousTime):
    """Continuous-time consistency distillation (sCD) of a diffusion model."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Continuous-time consistency distillation",
        description="a consistency model by continuous-time consistency distillation (sCD, Lu and Song 2024)",
        paper="https://arxiv.org/abs/2410.11081",
        is_consistency_model=True,
        can_teach=False,
        has_target=False,
        follows_teacher=True,
        learns_weighting=True,
        preconditioning="trigflow",
        sampler="multistep",
        boundary_at_zero=True,
        depends_on_total_steps=False,
    )

    kind: Literal["scd"]

    @property
    def embeds_angle(self) -> bool:
        return self.teacher_time_embedding == "angle"

    @property
    def forward_passes(self) -> float:
        """As sCT, and the teacher."""
        return 4 + (2 if self.needs_forward_mode else 3)
