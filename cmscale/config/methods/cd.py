"""CD: consistency distillation of a diffusion model (Song et al. 2023, algorithm 2)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cmscale.config.methods.base import MethodFacts, MethodSchedule, SecondTime
from cmscale.config.methods.shared import ChosenDistance, FollowsTeacher, OnSigma, SampledInOneStep, WithoutForwardMode
from cmscale.config.section import Rate, key

Solver = Literal["euler", "heun"]


class CD(FollowsTeacher, ChosenDistance, OnSigma, SampledInOneStep, WithoutForwardMode):
    """Consistency distillation (algorithm 2)."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Consistency distillation",
        description="a consistency model by distillation (CD, Song et al. 2023, algorithm 2)",
        paper="https://arxiv.org/abs/2303.01469",
        is_consistency_model=True,
        can_teach=False,
        has_target=True,
        follows_teacher=True,
        learns_weighting=False,
        preconditioning="consistency",
        sampler="multistep",
        boundary_at_zero=False,
        depends_on_total_steps=False,
    )

    kind: Literal["cd"]
    num_scales: Annotated[int, Field(ge=2)] = key(
        40, "N, the number of times of the Karras grid.", source="Consistency Models, LSUN 256"
    )
    solver: Solver = key(
        "heun", "How the teacher steps from a time to the one below it.", source="Consistency Models, LSUN 256"
    )
    target_ema: Rate = key(
        0.95, "mu, the decay rate per step of the target network.", source="Consistency Models, LSUN 256"
    )

    @property
    def forward_passes(self) -> float:
        """Student forward and backward, target, and one teacher pass per solver evaluation."""
        return 4 + (2 if self.solver == "heun" else 1)

    @property
    def final_num_scales(self) -> int:
        return self.num_scales

    @property
    def second_time(self) -> SecondTime:
        """On LSUN Bedroom: 17 of 39 with LPIPS, 18 of 39 with l2 (Song et al. 2023, appendix C)."""
        return SecondTime(index=17 if self.distance == "lpips" else 18, last=39)

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        del step, total_steps
        return MethodSchedule(num_scales=self.num_scales, target_ema=self.target_ema)
