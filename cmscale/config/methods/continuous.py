"""What sCT and sCD share: TrigFlow times, tangent warm-up and tangent normalisation (Lu and Song 2024)."""

import math
from statistics import NormalDist
from typing import Literal

from cmscale.config.methods.base import MethodSchedule, SecondTime, TimeEmbedding
from cmscale.config.methods.shared import SampledInOneStep
from cmscale.config.section import NonNegative, Positive, key

PUBLISHED_SIZE = 32
"""Image size in pixels (CIFAR-10) for which sCM's p_mean and p_std were chosen."""
RARE_ABOVE = 0.625
"""Of sigma_max. A step should train at some times above it, as sampling starts at sigma_max: 50 of 80."""


class ContinuousTime(SampledInOneStep):
    """The keys of continuous-time consistency models (sCM, arXiv 2410.11081)."""

    p_mean: float = key(
        -1.0,
        "Mean of ln sigma, the logarithm of the noise levels of training. Larger images need more noise.",
        source="sCM, CIFAR-10; the LSUN configs have values for 256 px",
    )
    p_std: Positive = key(
        1.4, "Standard deviation of ln sigma.", source="sCM, CIFAR-10; the LSUN configs have values for 256 px"
    )
    tangent_warmup_steps: NonNegative = key(
        10000,
        "H: the tangent's second term grows linearly over as many steps.",
        unit="steps",
        source="sCM, section 4.2",
    )
    tangent_norm_c: Positive = key(0.1, "c of the normalised tangent g / (||g|| + c).", source="sCM, section 4.2")
    tangent: Literal["auto", "jvp", "central_differences", "backward_differences"] = key(
        "auto",
        "How the network is differentiated in time: by a forward-mode derivative (jvp), or by differences along the "
        "trajectory. auto: jvp if its time embedding gets the angle, else backward_differences.",
        source="measurements: a derivative of 250 ln(sigma) does not train the network",
    )
    teacher_time_embedding: TimeEmbedding = key(
        "log_sigma",
        "What the teacher's time embedding gets; see method.time_embedding.",
        source="the released teachers",
    )

    @property
    def derivative(self) -> Literal["jvp", "central_differences", "backward_differences"]:
        """How dF/dt is computed.

        With `auto` it is a difference where the time embedding gets 250 ln(sigma): its sinusoids then turn 250 times as
        fast as ln(sigma), so that the derivative at a point is dominated by their ripple and does not train the
        network. Of the differences it is the one that damps errors of short period; see `model.trigflow.STENCILS`.
        """
        if self.tangent != "auto":
            return self.tangent
        return "jvp" if self.embeds_angle else "backward_differences"

    @property
    def needs_forward_mode(self) -> bool:
        return self.derivative == "jvp"

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

    def cautions(self, *, image_size: int, batch_size: int) -> list[str]:
        found = []
        high = RARE_ABOVE * self.sigma_max
        expected = batch_size * (1 - NormalDist(self.p_mean, self.p_std).cdf(math.log(high)))
        if expected < 1 and image_size > PUBLISHED_SIZE:
            mean, std = noise_for_size(image_size)
            found.append(
                f"method.p_mean, method.p_std: {expected:.2g} of the {batch_size} images of a step have a sigma above "
                f"{high:g}, but sampling starts at {self.sigma_max:g}; for {image_size} px set "
                f"method.p_mean={mean:.2f} method.p_std={std:.2f}"
            )
        return found


def noise_for_size(image_size: int) -> tuple[float, float]:
    """p_mean and p_std for an image size in pixels, from sCM's (-1.0, 1.4) at 32 px.

    The mean of s x s pixels has 1/s of the noise. A picture of S px therefore shows at sigma what its reduction to 32
    px shows at 32/S sigma: what the published values train at the upper end lies ln(S/32) higher, while the finest
    details are as they were. So the quantile at +2 standard deviations moves by ln(S/32), and that at -2 stays.
    """
    shift = math.log(image_size / PUBLISHED_SIZE)
    return -1.0 + shift / 2, 1.4 + shift / 4
