"""Reads and writes weights as OpenAI's `.pt`, as a diffusers folder, and as safetensors with a config."""

from cmscale.interop.diffusers_folder import read_diffusers, write_diffusers
from cmscale.interop.names import parameter_shapes
from cmscale.interop.openai_file import read_openai, write_openai
from cmscale.interop.safetensors_file import read_safetensors, write_safetensors

__all__ = [
    "parameter_shapes",
    "read_diffusers",
    "read_openai",
    "read_safetensors",
    "write_diffusers",
    "write_openai",
    "write_safetensors",
]
