"""Chooses the preconditioning of a raw network by its method."""

from typing import assert_never

from cmscale.config import SCD, SCT, MethodSection
from cmscale.model.denoiser import ConsistencyDenoiser, EDMDenoiser, Raw
from cmscale.model.trigflow import TrigFlow

Denoiser = EDMDenoiser | ConsistencyDenoiser | TrigFlow


def denoiser_for(method: MethodSection, raw: Raw) -> Denoiser:
    """The denoiser or consistency function that a method trains and samples."""
    time = "angle" if method.embeds_angle else "log_sigma"
    match method.facts.preconditioning:
        case "edm":
            return EDMDenoiser(raw, sigma_data=method.sigma_data, time=time)
        case "consistency":
            return ConsistencyDenoiser(raw, sigma_data=method.sigma_data, time=time, sigma_min=method.sigma_min)
        case "trigflow":
            assert isinstance(method, SCT | SCD)
            return TrigFlow(raw, sigma_data=method.sigma_data, time=time, derivative=method.derivative)
    assert_never(method.facts.preconditioning)


def teacher_denoiser_for(method: MethodSection, raw: Raw) -> EDMDenoiser | TrigFlow:
    """A frozen diffusion model in the form that the method's loss evaluates: a denoiser, or for sCD a TrigFlow."""
    time = "angle" if method.embeds_angle else "log_sigma"  # of the teacher too: `load_teacher` refuses another
    if method.facts.preconditioning == "trigflow":
        return TrigFlow(raw, sigma_data=method.sigma_data, time=time)
    return EDMDenoiser(raw, sigma_data=method.sigma_data, time=time)
