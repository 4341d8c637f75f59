"""Builds the training loss of a method from its config; there is one file per method."""

from typing import Never

from cmscale.config import CD, CT, ECT, EDM, ICT, MCD, PD, SCD, SCT, TCM
from cmscale.config.methods import AnyMethod
from cmscale.consistency.distance import Distance
from cmscale.consistency.losses.base import Loss, Measure, unmeasured
from cmscale.consistency.losses.cd import CDLoss
from cmscale.consistency.losses.ct import CTLoss
from cmscale.consistency.losses.ect import ECTLoss
from cmscale.consistency.losses.edm import EDMLoss
from cmscale.consistency.losses.ict import ICTLoss
from cmscale.consistency.losses.mcd import MCDLoss
from cmscale.consistency.losses.pd import PDLoss
from cmscale.consistency.losses.scd import SCDLoss
from cmscale.consistency.losses.sct import SCTLoss
from cmscale.consistency.losses.tcm import TCMLoss

__all__ = ["Loss", "Measure", "build_loss"]


def build_loss(method: AnyMethod, distance: Distance | None, *, measure: Measure = unmeasured) -> Loss:
    """The loss of a method.

    Args:
        distance: The result of `build_distance` for the same method.
        measure: Gets what the loss computes besides its value: of sCT and sCD `tangent_norm` and `weighting`.
    """
    match method:
        case EDM():
            return EDMLoss(method, _required(distance))
        case CD():
            return CDLoss(method, _required(distance))
        case CT():
            return CTLoss(method, _required(distance))
        case ICT():
            return ICTLoss(method, _required(distance))
        case ECT():
            return ECTLoss(method, _required(distance))
        case TCM():
            return TCMLoss(method, _required(distance))
        case MCD():
            return MCDLoss(method, _required(distance))
        case PD():
            return PDLoss(method, _required(distance))
        case SCT():
            return SCTLoss(method, measure)
        case SCD():
            return SCDLoss(method, measure)
    return _refuse(method)


def _required(distance: Distance | None) -> Distance:
    assert distance is not None, "the method's distance_settings are None, but its loss takes a distance"
    return distance


def _refuse(method: Never) -> Never:
    """Lets the type checker prove the match exhaustive; at run time it names the missing case."""
    name = type(method).__name__
    raise TypeError(f"method {name}: no case in cmscale/consistency/losses/__init__.py; see ops/adding_a_method.md")
