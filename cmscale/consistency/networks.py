"""Defines the set of networks that a loss evaluates."""

from dataclasses import dataclass

from cmscale.consistency.solver import Denoise


@dataclass(frozen=True)
class Networks:
    """Denoisers (x [B, ...], sigma [B], *, dropout_keys) -> estimate of x_0. Only the student is differentiated.

    Attributes:
        target: The target network; None for methods whose target is the student without gradient (iCT, ECT). In
            progressive distillation it is the stage's teacher.
        teacher: The frozen diffusion model that CD and sCD follow: an EDM denoiser, for sCD a TrigFlow network.
    """

    student: Denoise
    target: Denoise | None = None
    teacher: Denoise | None = None

    @property
    def target_or_student(self) -> Denoise:
        """The target network; the student where the method has none."""
        return self.student if self.target is None else self.target
