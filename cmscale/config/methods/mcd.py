"""MCD: multistep consistency distillation of a diffusion model (Heek et al. 2024, arXiv 2403.06807).

The range of noise is divided into segments, in each of which the student jumps to the segment's lower end. One segment
is a consistency model; as many as the teacher has steps are the teacher itself.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cmscale.config.methods.base import (
    UNPUBLISHED_SECOND_TIME,
    DistanceName,
    MethodFacts,
    MethodSchedule,
    SecondTime,
)
from cmscale.config.methods.shared import ChosenDistance, FollowsTeacher, HuberC, OnSigma, WithoutForwardMode
from cmscale.config.section import Count, NonNegative, key

SOURCE = "Multistep Consistency Models"


class MCD(FollowsTeacher, ChosenDistance, OnSigma, WithoutForwardMode):
    """Multistep consistency distillation (Heek et al. 2024, algorithm 1)."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Multistep consistency distillation",
        description="a multistep consistency model by distillation (Heek et al. 2024)",
        paper="https://arxiv.org/abs/2403.06807",
        is_consistency_model=False,  # it jumps to the start of a segment, not to that of the trajectory
        can_teach=False,
        has_target=False,
        follows_teacher=True,
        learns_weighting=False,
        preconditioning="edm",  # a new student equals the diffusion model
        sampler="euler",
        boundary_at_zero=False,
        depends_on_total_steps=False,
    )

    kind: Literal["mcd"]
    segments: Annotated[int, Field(ge=1, le=64)] = key(
        4,
        "Parts of equal length of the Karras curve from sigma_min to sigma_max. The model is sampled in as many steps, "
        "and in no other number.",
        source=f"{SOURCE} has 1, 2, 4, 8 and 16",
    )
    teacher_steps: Count = key(
        64,
        "Steps of the teacher over the whole range of noise at the beginning; a multiple of segments.",
        unit="steps",
        source=SOURCE,
    )
    final_teacher_steps: Count = key(
        1280,
        "Its steps after annealing_steps, between which they grow exponentially; a multiple of segments.",
        unit="steps",
        source=SOURCE,
    )
    annealing_steps: NonNegative = key(
        100_000, "Steps of training over which the teacher's steps grow.", unit="steps", source=SOURCE
    )
    solver: Literal["addim", "euler", "heun"] = key(
        "addim",
        "How the teacher steps from a time to the one below it: euler is DDIM; addim is DDIM with as much more of the "
        "estimated noise as is missing in the norm; heun takes two passes of the teacher.",
        source=SOURCE,
    )
    distance: DistanceName = key(
        "pseudo_huber", "Distance of the loss between two images, as for cd and ct.", source=SOURCE
    )
    huber_c: HuberC = key(
        1e-4,
        "c of the pseudo-Huber distance; 0: the Euclidean distance. null: 0.00054 sqrt(D), with D values per image.",
        source=f"{SOURCE}, A.1",
    )
    weighting: Literal["edm", "uniform"] = key(
        "edm",
        "Factor of the loss at time t: 1 / t^2 + 1 / sigma_data^2, which is that of the diffusion model, or 1.",
        source=f"{SOURCE} has 1 / t^2 + 1 with images of standard deviation 1",
    )

    @model_validator(mode="after")
    def _check_division(self) -> "MCD":
        for name, steps in (("teacher_steps", self.teacher_steps), ("final_teacher_steps", self.final_teacher_steps)):
            if steps % self.segments:
                raise ValueError(f"{name}: {steps} steps can't be divided into {self.segments} segments; change one")
        if self.teacher_steps > self.final_teacher_steps:
            raise ValueError(
                f"teacher_steps: {self.teacher_steps} must not be above final_teacher_steps, {self.final_teacher_steps}"
            )
        return self

    @property
    def forward_passes(self) -> float:
        """Student forward and backward, once more without gradient, and one teacher pass per solver evaluation."""
        return 4 + (2 if self.solver == "heun" else 1)

    @property
    def final_num_scales(self) -> int:
        return self.final_teacher_steps + 1

    @property
    def default_sampling_steps(self) -> int:
        return self.segments

    @property
    def only_sampling_steps(self) -> int:
        return self.segments

    @property
    def second_time(self) -> SecondTime:
        """The middle of the Karras curve, where two segments meet."""
        return UNPUBLISHED_SECOND_TIME

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        del total_steps
        return MethodSchedule(num_scales=mcd_teacher_steps(self, step) + 1)


def mcd_teacher_steps(method: MCD, step: int) -> int:
    """T(k) = T(0) (T(K) / T(0))^min(k / K, 1), rounded to whole steps in each segment; K is `annealing_steps`."""
    fraction = min(step / method.annealing_steps, 1.0) if method.annealing_steps else 1.0
    growth = (method.final_teacher_steps / method.teacher_steps) ** fraction
    return method.segments * round(method.teacher_steps * growth / method.segments)
