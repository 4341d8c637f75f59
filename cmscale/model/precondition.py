"""Owns the choice of a method's denoiser."""

from cmscale.config import ECT, EDM, PD, SCD, SCT, Method
from cmscale.model.denoiser import ConsistencyDenoiser, EDMDenoiser, Raw
from cmscale.model.trigflow import TrigFlow

Denoiser = EDMDenoiser | ConsistencyDenoiser | TrigFlow


def denoiser_for(method: Method, raw: Raw) -> Denoiser:
    """The denoiser that a method trains and samples.

    ECT keeps its teacher's preconditioning: its times go below eps, and it starts exactly at the teacher. sCM from
    random weights is told t itself; from a teacher's weights it is told what they expect.
    """
    match method:
        case EDM() | ECT() | PD():
            return EDMDenoiser(raw, sigma_data=method.sigma_data)
        case SCT(start="random"):
            return TrigFlow(raw, sigma_data=method.sigma_data, time="angle")
        case SCT() | SCD():
            return TrigFlow(raw, sigma_data=method.sigma_data, time="log_sigma")
        case _:
            return ConsistencyDenoiser(raw, sigma_data=method.sigma_data, sigma_min=method.sigma_min)
