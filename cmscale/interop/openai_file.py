"""Reads and writes OpenAI's format: a state dict saved by torch, of which only tensors are unpickled."""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmscale.config import Model
from cmscale.errors import UserError
from cmscale.interop.files import located, readable, writable
from cmscale.interop.names import Weights, parameter_shapes, parameters
from cmscale.interop.strict import strict_weights


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
        found = _load(path, origin)
    for parameter in parameters(model):
        tensor = found.get(parameter.name)
        if parameter.is_pointwise and isinstance(tensor, Tensor) and tensor.shape == parameter.shape[:3]:
            found[parameter.name] = tensor[..., None]
    return strict_weights(found, parameter_shapes(model), origin=origin)


def write_openai(target: str | Path, weights: Mapping[str, Tensor], *, model: Model) -> None:
    """Writes the weights of `model` as a `.pt` file (a path or `s3://`) that OpenAI's code loads.

    Raises:
        UserError: the weights are not those of `model`, the disk is full, or writing is not allowed.
    """
    state = strict_weights(weights, parameter_shapes(model), origin="the weights to write")
    size = sum(4 * tensor.numel() for tensor in state.values())
    with writable(*located(target), size=size) as path:
        torch.save(OrderedDict(state), path)


def _load(path: Path, origin: str) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{origin}: refused, as it is damaged or holds objects that could run code; give a state dict of tensors"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{origin}: damaged, or not written by torch.save ({first}); copy it again") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{origin}: holds {type(found).__name__}; give a state dict of tensors")
    return dict(found)
