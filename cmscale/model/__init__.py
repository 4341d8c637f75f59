"""The raw network (ADM UNet), its attention, and the denoisers that precondition it."""

from cmscale.model.denoiser import ConsistencyDenoiser, EDMDenoiser, denoiser_for
from cmscale.model.unet import UNet, build_unet

__all__ = ["ConsistencyDenoiser", "EDMDenoiser", "UNet", "build_unet", "denoiser_for"]
