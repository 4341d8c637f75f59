"""The training methods: one file per `method.kind` with its keys, its facts and its schedule, and their union."""

from typing import Annotated, get_args

from pydantic import Field

from cmscale.config.methods.base import MethodFacts, MethodSchedule, MethodSection
from cmscale.config.methods.cd import CD
from cmscale.config.methods.ct import CT
from cmscale.config.methods.ect import ECT
from cmscale.config.methods.edm import EDM
from cmscale.config.methods.ict import ICT
from cmscale.config.methods.mcd import MCD
from cmscale.config.methods.pd import PD
from cmscale.config.methods.scd import SCD
from cmscale.config.methods.sct import SCT
from cmscale.config.methods.tcm import TCM

AnyMethod = EDM | CD | CT | ICT | ECT | SCT | SCD | PD | TCM | MCD
Method = Annotated[AnyMethod, Field(discriminator="kind")]

METHODS_BY_KIND: dict[str, type[MethodSection]] = {
    get_args(method.model_fields["kind"].annotation)[0]: method for method in get_args(AnyMethod)
}
"""The section of every `method.kind`."""

KINDS: tuple[str, ...] = tuple(METHODS_BY_KIND)
"""Every `method.kind`."""

__all__ = [
    "CD",
    "CT",
    "ECT",
    "EDM",
    "ICT",
    "KINDS",
    "MCD",
    "METHODS_BY_KIND",
    "PD",
    "SCD",
    "SCT",
    "TCM",
    "AnyMethod",
    "Method",
    "MethodFacts",
    "MethodSchedule",
    "MethodSection",
]
