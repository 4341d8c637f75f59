"""What sCT and sCD share: TrigFlow times, tangent warm-up and tangent normalisation (Lu and Song 2024)."""

import math
from typing import Literal

from cmscale.config.methods.base import MethodSchedule, SampledInOneStep, SecondTime, TimeEmbedding
from cmscale.config.section import NonNegative, Positive


class ContinuousTime(SampledInOneStep):
    """The keys of continuous-time consistency models (sCM, arXiv 2410.11081)."""

    p_mean: float = -1.0
    p_std: Positive = 1.4
    tangent_warmup_steps: NonNegative = 10000
    tangent_norm_c: Positive = 0.1
    tangent: Literal["auto", "jvp", "central_differences"] = "auto"
    teacher_time_embedding: TimeEmbedding = "log_sigma"

    @property
    def takes_central_differences(self) -> bool:
        """Whether dF/dt is a central difference along the trajectory, and not a forward-mode derivative.

        With `auto` it is one where the time embedding gets 250 ln(sigma): its sinusoids then turn 250 times as fast
        as ln(sigma), so that the derivative at a point is dominated by their ripple and does not train the network.
        """
        if self.tangent == "auto":
            return not self.embeds_angle
        return self.tangent == "central_differences"

    @property
    def needs_forward_mode(self) -> bool:
        return not self.takes_central_differences

    @property
    def distance_settings(self) -> None:
        return None

    @property
    def final_num_scales(self) -> None:
        return None

    @property
    def second_time(self) -> SecondTime:
        """t = 1.1, that is sigma_data tan(1.1); sCM, appendix G.2."""
        return SecondTime(index=75, last=150, sigma=self.sigma_data * math.tan(1.1))

    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        del step, total_steps
        return MethodSchedule()

    def tangent_ratio(self, step: int) -> float:
        """r = min(1, k / H), the tangent warm-up; sCM, section 4.2."""
        return min(1.0, step / self.tangent_warmup_steps) if self.tangent_warmup_steps else 1.0
