"""Reads and writes OpenAI's format: a state dict saved by torch. Nothing in a file is executed."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cmscale.config import NOISE_EMBEDDING_SCALE, Model
from cmscale.errors import UserError
from cmscale.interop.files import located, readable, writable
from cmscale.interop.names import Weights, parameter_shapes, parameters
from cmscale.interop.strict import strict_weights
from cmscale.interop.torch_file import read_state_dict


def read_openai(source: str | Path, model: Model) -> Weights:
    """Reads the weights in a `.pt` file (a path or `s3://`) as float32; they must be exactly those of `model`.

    `model.qkv_layout` must be the file's order of qkv channels; the network computes in that order. The attention
    weights of older guided-diffusion files (1D convolutions) are accepted too.

    Raises:
        UserError: there is no such file, it is not a state dict of tensors, or it holds another network.
    """
    storage, key = located(source)
    origin = storage.join(key)
    with readable(storage, key) as path:
        shapes = {each.name: (each.shape, each.shape[:3]) for each in parameters(model)}
        found = read_state_dict(path, shapes, origin=origin)
    for parameter in parameters(model):
        tensor = found.get(parameter.name)
        if parameter.is_pointwise and isinstance(tensor, Tensor) and tensor.shape == parameter.shape[:3]:
            found[parameter.name] = tensor[..., None]
    return strict_weights(found, parameter_shapes(model), origin=origin)


def write_openai(target: str | Path, weights: Mapping[str, Tensor], *, model: Model) -> None:
    """Writes the weights of `model` as a `.pt` file (a path or `s3://`) that OpenAI's code loads.

    Raises:
        UserError: the weights are not those of `model`, OpenAI's code can't compute its time embedding, the disk is
            full, or writing is not allowed.
    """
    if model.noise_embedding_scale != NOISE_EMBEDDING_SCALE:
        raise UserError(
            f"{target}: OpenAI's code scales the time embedding by {NOISE_EMBEDDING_SCALE:g}, this network by "
            f"{model.noise_embedding_scale:g}; use safetensors"
        )
    state = strict_weights(weights, parameter_shapes(model), origin="the weights to write")
    size = sum(4 * tensor.numel() for tensor in state.values())
    with writable(*located(target), size=size) as path:
        torch.save(OrderedDict(state), path)
