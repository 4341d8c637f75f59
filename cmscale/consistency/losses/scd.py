"""The loss of sCD: continuous-time consistency distillation (arXiv 2410.11081, algorithm 1)."""

from dataclasses import dataclass

from torch import Tensor

from cmscale.config import SCD
from cmscale.consistency.losses.continuous import ContinuousLoss, Flow
from cmscale.consistency.networks import Networks


@dataclass(frozen=True)
class SCDLoss(ContinuousLoss):
    """`ContinuousLoss` with dx_t/dt = sd F of the teacher."""

    method: SCD

    def slope(self, networks: Networks, x: Tensor, t: Tensor, *, clean: Tensor, noise: Tensor) -> Tensor:
        del clean, noise
        assert isinstance(networks.teacher, Flow), "sCD needs a teacher"
        sd = self.method.sigma_data
        return sd * networks.teacher.flow(x / sd, t.to(x))
