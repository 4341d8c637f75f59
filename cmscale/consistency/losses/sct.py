"""The loss of sCT: continuous-time consistency training (arXiv 2410.11081, algorithm 1)."""

from dataclasses import dataclass

from torch import Tensor

from cmscale.config import SCT
from cmscale.consistency.losses.continuous import ContinuousLoss
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import expand_as


@dataclass(frozen=True)
class SCTLoss(ContinuousLoss):
    """`ContinuousLoss` with dx_t/dt = cos(t) z - sin(t) x_0."""

    method: SCT

    def slope(self, networks: Networks, x: Tensor, t: Tensor, *, clean: Tensor, noise: Tensor) -> Tensor:
        del networks, x
        return expand_as(t.cos(), clean) * noise - expand_as(t.sin(), clean) * clean
