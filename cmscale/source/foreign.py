"""Reads weights of other projects, which hold no config of ours."""

import torch

from cmscale.config import Config
from cmscale.config.sources import is_nvlabs, is_openai, is_safetensors
from cmscale.errors import UserError
from cmscale.interop import read_diffusers, read_nvlabs, read_openai, read_safetensors
from cmscale.io.fetch import local_file
from cmscale.io.storage import open_storage


def read_foreign(origin: str, config: Config) -> dict[str, torch.Tensor]:
    """Weights that hold no config, in any format of other projects.

    Raises:
        UserError: they do not fit the config.
    """
    if is_openai(origin):
        return read_openai(local_file(origin), config.model)
    if is_nvlabs(origin):
        return read_edm(origin, config, key=origin)
    if is_safetensors(origin):
        return read_safetensors(local_file(origin), model=config.model)[0]
    return read_diffusers(open_storage(origin), model=config.model, method=config.method)[0]


def read_edm(origin: str, config: Config, *, key: str) -> dict[str, torch.Tensor]:
    """The diffusion model in a pickle of NVlabs' EDM; its network is the config's.

    Args:
        key: What names it, for messages.
    """
    found = read_nvlabs(local_file(origin), config.model)
    if found.sigma_data != config.method.sigma_data:
        raise UserError(
            f"{key}: {origin} was trained with method.sigma_data {found.sigma_data:g}, this config has "
            f"{config.method.sigma_data:g}; set method.sigma_data={found.sigma_data:g}, or give other weights"
        )
    return found.weights
