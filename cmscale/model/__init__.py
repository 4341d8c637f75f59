"""Defines the raw network (ADM UNet), its attention, and the denoisers that precondition it."""

from cmscale.model.denoiser import ConsistencyDenoiser, EDMDenoiser
from cmscale.model.precondition import denoiser_for
from cmscale.model.trigflow import TrigFlow
from cmscale.model.unet import UNet, build_unet

__all__ = ["ConsistencyDenoiser", "EDMDenoiser", "TrigFlow", "UNet", "build_unet", "denoiser_for"]
