"""Reads and writes weights: OpenAI's `.pt`, diffusers' folder, safetensors with a config; reads NVlabs' `.pkl`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmscale.interop.diffusers_config import pipeline_timesteps, refuse_inexpressible
    from cmscale.interop.diffusers_folder import (
        check_folder,
        holds_config,
        read_diffusers,
        refuse_another_model,
        write_diffusers,
    )
    from cmscale.interop.names import parameter_shapes
    from cmscale.interop.nvlabs import EDMNetwork, read_nvlabs
    from cmscale.interop.openai_file import read_openai, write_openai
    from cmscale.interop.safetensors_file import read_safetensors, write_safetensors

__all__ = [
    "EDMNetwork",
    "check_folder",
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
_MODULES = {
    "diffusers_config": ("pipeline_timesteps", "refuse_inexpressible"),
    "diffusers_folder": ("check_folder", "holds_config", "read_diffusers", "refuse_another_model", "write_diffusers"),
    "names": ("parameter_shapes",),
    "nvlabs": ("EDMNetwork", "read_nvlabs"),
    "openai_file": ("read_openai", "write_openai"),
    "safetensors_file": ("read_safetensors", "write_safetensors"),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: reading an array of a pickle needs no torch, which takes seconds."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"cmscale.interop.{module}"), name)
    raise AttributeError(f"module 'cmscale.interop' has no attribute {name!r}")
