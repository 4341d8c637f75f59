"""Owns the set of networks that a loss works with."""

from dataclasses import dataclass

from cmscale.consistency.solver import Denoise


@dataclass(frozen=True)
class Networks:
    """Denoisers (x, sigma [B], *, dropout_keys) -> x0. Only the student is differentiated.

    target None means: the student itself, without gradient (iCT, ECT). The teacher is an EDM denoiser (of sCD: in
    TrigFlow's terms); of progressive distillation the target is the teacher.
    """

    student: Denoise
    target: Denoise | None = None
    teacher: Denoise | None = None

    @property
    def target_or_student(self) -> Denoise:
        return self.student if self.target is None else self.target
