"""Owns OpenAI's format: a state dict saved by torch, read without unpickling anything but tensors."""

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
    """The weights in a `.pt` file (a path or `s3://`), strictly those of `model`, float32.

    `model.qkv_layout` says in which order the file has its qkv channels; the network computes in that order,
    so nothing is moved. Attention as one-dimensional convolutions (older guided-diffusion) is taken too.

    Raises:
        UserError: no such file, not a state dict, anything in it but tensors, or not this network's.
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
        UserError: not this network's weights, no room, or not allowed to write.
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
            f"{origin}: refused: no plain state dict of tensors (loading it would run code, or it is damaged)"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{origin}: not a file that torch.save wrote, or damaged ({first})") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{origin}: holds {type(found).__name__}, not a state dict of tensors")
    return dict(found)
