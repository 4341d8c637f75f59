"""sCT: continuous-time consistency training (Lu and Song 2024, algorithm 1)."""

from typing import ClassVar, Literal

from cmscale.config.methods.base import MethodFacts, TeacherChoice
from cmscale.config.methods.continuous import ContinuousTime
from cmscale.config.methods.shared import TEACHER, TEACHER_WEIGHTS
from cmscale.config.section import key, operational


class SCT(ContinuousTime):
    """Continuous-time consistency training (sCT), from random weights or from those of a diffusion model."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Continuous-time consistency training",
        description="a consistency model by continuous-time consistency training (sCT, Lu and Song 2024)",
        paper="https://arxiv.org/abs/2410.11081",
        is_consistency_model=True,
        can_teach=False,
        has_target=False,
        follows_teacher=False,
        learns_weighting=True,
        preconditioning="trigflow",
        sampler="multistep",
        boundary_at_zero=True,
        depends_on_total_steps=False,
    )

    kind: Literal["sct"]
    teacher: str | None = operational(None, f"{TEACHER} Only with start: teacher.")
    teacher_weights: str | None = TEACHER_WEIGHTS
    start: Literal["random", "teacher"] = key(
        "random",
        "Whether the network starts with random weights or with the teacher's.",
        source="training from scratch needs nothing else; sCM starts with a diffusion model",
    )

    @property
    def teacher_choice(self) -> TeacherChoice | None:
        if self.start == "random" or self.teacher is None:
            return None
        return TeacherChoice(self.teacher, self.teacher_weights)

    @property
    def needs_first_weights(self) -> bool:
        return self.start == "teacher"

    @property
    def embeds_angle(self) -> bool:
        """A new network embeds the angle t (sCM, section 4.1); a teacher's weights need what the teacher embeds."""
        return self.start == "random" or self.teacher_time_embedding == "angle"

    @property
    def forward_passes(self) -> float:
        """Student forward and backward, and without gradient F with its derivative (2), or F at three times (3)."""
        return 3 + (2 if self.needs_forward_mode else 3)
