"""Weights in the formats of others and in our own: OpenAI's `.pt`, a diffusers folder, safetensors."""

from cmscale.interop.card import model_card
from cmscale.interop.diffusers_folder import read_diffusers, write_diffusers
from cmscale.interop.names import convert_qkv_layout, parameter_shapes
from cmscale.interop.openai_file import read_openai, write_openai
from cmscale.interop.safetensors_file import read_safetensors, write_safetensors

__all__ = [
    "convert_qkv_layout",
    "model_card",
    "parameter_shapes",
    "read_diffusers",
    "read_openai",
    "read_safetensors",
    "write_diffusers",
    "write_openai",
    "write_safetensors",
]
