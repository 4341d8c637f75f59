"""PD: progressive distillation by Euler steps on the Karras grid (Salimans and Ho 2022), with its stages."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cmscale.config.methods.base import (
    UNPUBLISHED_SECOND_TIME,
    DistanceName,
    MethodFacts,
    MethodSchedule,
    Scheduled,
    SecondTime,
)
from cmscale.config.methods.shared import ChosenDistance, OnSigma, SampledInOneStep, StartsTrained, WithoutForwardMode
from cmscale.config.section import key


class PD(Scheduled, StartsTrained, ChosenDistance, OnSigma, SampledInOneStep, WithoutForwardMode):
    """Progressive distillation (Salimans and Ho 2022); the released consistency code takes the same Euler steps."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Progressive distillation",
        description="a diffusion model by progressive distillation (Salimans and Ho 2022)",
        paper="https://arxiv.org/abs/2202.00512",
        is_consistency_model=False,
        can_teach=False,
        has_target=True,  # the stage's teacher
        follows_teacher=False,
        learns_weighting=False,
        preconditioning="edm",
        sampler="euler",
        boundary_at_zero=False,
        depends_on_total_steps=True,
    )

    kind: Literal["pd"]
    distance: DistanceName = key(
        "l2", "Distance of the loss between two images, as for cd and ct.", source="Salimans and Ho 2022"
    )
    start_scales: Annotated[int, Field(ge=2)] = key(
        64,
        "N of the first stage, a power of two. Each stage halves it, down to 1.",
        source="the released consistency code",
    )
    weighting: Literal["truncated_snr", "uniform"] = key(
        "truncated_snr",
        "Factor of the loss at time t: max(1 / t^2, 1), or 1.",
        source="Salimans and Ho 2022, equation 9",
    )

    @model_validator(mode="after")
    def _check_halving(self) -> "PD":
        if self.start_scales & (self.start_scales - 1):
            raise ValueError(f"start_scales: {self.start_scales} can't be halved down to 1; give a power of two")
        return self

    @property
    def restarts_averages(self) -> bool:
        return True

    @property
    def forward_passes(self) -> float:
        """Student forward and backward, and two steps of the stage's teacher."""
        return 5

    @property
    def final_num_scales(self) -> None:
        return None

    @property
    def second_time(self) -> SecondTime:
        return UNPUBLISHED_SECOND_TIME

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        scales, fraction = pd_stage(step, total_steps=total_steps, start_scales=self.start_scales)
        following, _ = pd_stage(step + 1, total_steps=total_steps, start_scales=self.start_scales)
        ends = following != scales
        return MethodSchedule(
            num_scales=scales,
            target_ema=0.0 if ends else 1.0,
            learning_rate_factor=1 - fraction,
            ends_stage=ends,
            sampling_steps=scales,
        )


def pd_stage(step: int, *, total_steps: int, start_scales: int) -> tuple[int, float]:
    """The stage's N, and the fraction of the stage that is done, with which the learning rate falls to 0.

    N is start_scales, halved stage by stage down to 1 (Salimans and Ho 2022, algorithm 2). The stages of N = 2 and 1
    are twice as long as the others, as in the released consistency code.
    """
    stages = start_scales.bit_length()
    lengths = [1] * max(stages - 2, 0) + [2] * min(stages, 2)
    position = min(step, total_steps - 1) * sum(lengths)  # lengths are multiplied by total_steps: integers
    for stage, length in enumerate(lengths):
        if position < length * total_steps:
            return start_scales >> stage, position / (length * total_steps)
        position -= length * total_steps
    raise AssertionError((step, total_steps))
