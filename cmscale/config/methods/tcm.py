"""TCM: truncated consistency training, the second stage after ECT (Lee et al. 2024, arXiv 2410.14895).

The defaults are the authors' for ImageNet 64. For CIFAR-10 they take weighting inverse_gap, gap 0.001 and huber_c 0.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cmscale.config.methods.base import MethodFacts, MethodSchedule, MethodSection, SecondTime
from cmscale.config.methods.ect import ECT
from cmscale.config.methods.shared import (
    FollowsTeacher,
    HuberC,
    OnSigma,
    PseudoHuber,
    SampledInOneStep,
    WithoutForwardMode,
)
from cmscale.config.section import Positive, key, operational

SOURCE = "TCM, the authors' code"
Share = Annotated[float, Field(gt=0, lt=1)]


class TCM(FollowsTeacher, PseudoHuber, OnSigma, SampledInOneStep, WithoutForwardMode):
    """Truncated consistency training (Lee et al. 2024): ECT on the times from t' = `sigma_min` to sigma_max alone."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Truncated consistency training",
        description="a consistency model for large times, the second stage of truncated consistency training "
        "(TCM, Lee et al. 2024)",
        paper="https://arxiv.org/abs/2410.14895",
        is_consistency_model=True,
        can_teach=False,
        has_target=False,
        follows_teacher=True,
        learns_weighting=False,
        preconditioning="edm",  # ECT's
        sampler="multistep",
        boundary_at_zero=True,
        depends_on_total_steps=False,
    )

    kind: Literal["tcm"]
    teacher: str = operational(..., "The first stage: a SOURCE of a model of ect. It stays as it is.")
    sigma_min: Positive = key(1.0, "t', the smallest time; below it the first stage gives the targets.", source=SOURCE)
    p_mean: float = key(0.0, "Centre of ln t, the logarithm of the times of training.", source=SOURCE)
    p_std: Positive = key(
        0.2, "Scale of ln t, which has Student's distribution, truncated to the range.", source=SOURCE
    )
    degrees_of_freedom: Positive = key(0.01, "Of Student's distribution of ln t.", source=SOURCE)
    boundary_share: Share = key(0.25, "Share of the samples whose time is t'.", source=SOURCE)
    boundary_weight: Positive = key(0.1, "Weight of their mean loss beside that of the others.", source=SOURCE)
    weighting: Literal["inverse_gap", "edm"] = key(
        "edm",
        "Factor of the loss of the times t > r: 1 / (t - r), or edm: 1 / t^2 + 1 / sigma_data^2.",
        source="TCM, ImageNet 64; its CIFAR-10 recipe has inverse_gap",
    )
    gap: Share = key(
        1 / 256,
        "1 - r / t at large times: that of the last stage of the first stage's curriculum, q^-num_stages.",
        source="TCM, ImageNet 64; CIFAR-10: 0.001",
    )
    k: Positive = key(8.0, "How much wider the gap is at low noise: by 1 + k sigmoid(-b t).", source="ECT")
    b: Positive = key(1.0, "How fast that falls with t.", source="ECT")
    huber_c: HuberC = key(
        0.06,
        "c of the distance sqrt(||.||^2 + c^2) - c; null: 0.00054 sqrt(D).",
        source="TCM, ImageNet 64; CIFAR-10: 0",
    )

    def may_follow(self, teacher: MethodSection) -> bool:
        return isinstance(teacher, ECT)

    @property
    def teacher_wanted(self) -> str:
        return "the first stage, a model of ect"

    @property
    def forward_passes(self) -> float:
        """Student forward and backward, once more without gradient, and the first stage."""
        return 5

    @property
    def final_num_scales(self) -> None:
        return None

    @property
    def second_time(self) -> SecondTime:
        """ECT's 1.526, unless it is below t', where this network was not trained."""
        return SecondTime(index=75, last=150, sigma=max(1.526, self.sigma_min))

    @property
    def smallest_gap(self) -> float:
        """That at large times, where r / t = 1 - gap."""
        return -math.log1p(-self.gap)

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        del step, total_steps
        return MethodSchedule()
