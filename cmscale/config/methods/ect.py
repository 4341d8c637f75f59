"""ECT: easy consistency tuning of a diffusion model (Geng et al. 2024), with its curriculum.

The defaults are the authors' for CIFAR-10, except huber_c, which is 0 there. For ImageNet 64 they take weighting edm,
p_mean -0.8, p_std 1.6, q 4, num_stages 4 and huber_c 0.06.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cmscale.config.methods.base import MethodFacts, MethodSchedule, Scheduled, SecondTime
from cmscale.config.methods.shared import OnSigma, PseudoHuber, SampledInOneStep, StartsTrained, WithoutForwardMode
from cmscale.config.section import Count, Positive, key


class ECT(Scheduled, StartsTrained, PseudoHuber, OnSigma, SampledInOneStep, WithoutForwardMode):
    """Easy consistency tuning (Geng et al. 2024), from a diffusion model."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Easy consistency tuning",
        description="a consistency model by easy consistency tuning (ECT, Geng et al. 2024)",
        paper="https://arxiv.org/abs/2406.14548",
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
    p_mean: float = key(-1.1, "Mean of ln t, the logarithm of the times of training.", source="ECT, CIFAR-10")
    p_std: Positive = key(2.0, "Standard deviation of ln t.", source="ECT, CIFAR-10")
    weighting: Literal["inverse_gap", "edm"] = key(
        "inverse_gap",
        "Factor of the loss of the times t > r: 1 / (t - r), or edm: 1 / t^2 + 1 / sigma_data^2.",
        source="ECT, CIFAR-10; its ImageNet 64 recipe has edm",
    )
    q: Annotated[float, Field(gt=1)] = key(
        2.0,
        "Factor by which the gap between t and r shrinks from stage to stage (section 3.2).",
        source="ECT, CIFAR-10",
    )
    k: Positive = key(8.0, "How much wider the gap is at low noise: by 1 + k sigmoid(-b t).", source="ECT, CIFAR-10")
    b: Positive = key(1.0, "How fast that falls with t.", source="ECT, CIFAR-10")
    num_stages: Count = key(8, "Stages of the curriculum, equal parts of the training.", source="ECT, CIFAR-10")

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
