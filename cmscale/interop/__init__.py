"""Reads and writes weights: OpenAI's `.pt`, diffusers' folder, safetensors with a config; reads NVlabs' `.pkl`."""

from cmscale.interop.diffusers_config import pipeline_timesteps, refuse_inexpressible
from cmscale.interop.diffusers_folder import holds_config, read_diffusers, refuse_another_model, write_diffusers
from cmscale.interop.names import parameter_shapes
from cmscale.interop.nvlabs import EDMNetwork, read_nvlabs
from cmscale.interop.openai_file import read_openai, write_openai
from cmscale.interop.safetensors_file import read_safetensors, write_safetensors

__all__ = [
    "EDMNetwork",
    "holds_config",
    "parameter_shapes",
    "pipeline_timesteps",
    "read_diffusers",
    "read_nvlabs",
    "read_openai",
    "read_safetensors",
    "refuse_another_model",
    "refuse_inexpressible",
    "write_diffusers",
    "write_openai",
    "write_safetensors",
]
