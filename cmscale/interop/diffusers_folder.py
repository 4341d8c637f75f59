"""Reads and writes the folder of diffusers' ConsistencyModelPipeline, without importing diffusers."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cmscale.config import Config, MethodSection, Model, parse_config
from cmscale.config.published import published
from cmscale.config.sources import own_card
from cmscale.errors import UserError
from cmscale.interop.diffusers_config import (
    VERSION,
    check_scheduler,
    refuse_inexpressible,
    refuse_other_network,
    scheduler_config,
    unet_config,
)
from cmscale.interop.diffusers_weights import UNET_VARIANTS, UNET_WEIGHTS, read_weights, weight_files
from cmscale.interop.files import folder, readable, writable
from cmscale.interop.names import Weights, parameter_shapes, parameters, reorder_qkv
from cmscale.interop.safetensors_file import describe, read_metadata
from cmscale.interop.strict import strict_weights
from cmscale.io.storage import Storage, has_object

INDEX = "model_index.json"
UNET_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
CARD = "README.md"
_GRID = "samples.png"  # `cmscale.export` puts it beside the card
_FILES = (INDEX, UNET_CONFIG, *UNET_VARIANTS, SCHEDULER_CONFIG, CARD, _GRID)


def write_diffusers(
    target: str | Path | Storage,
    weights: Mapping[str, Tensor],
    *,
    config: Config,
    step: int,
    weights_name: str,
    card: str | None = None,
) -> None:
    """Writes a folder (a path or `s3://`) that `diffusers.ConsistencyModelPipeline.from_pretrained` loads.

    With the same start noise, diffusers and `cmscale sample` give the same images. The index is written last.

    Args:
        card: Text of the README.md.

    Raises:
        UserError: the weights are not those of `config.model`, diffusers can't express the network or the method, or
            the folder holds another model.
    """
    storage = folder(target)
    refuse_inexpressible(config, storage.url)
    check_folder(storage, config)
    state = strict_weights(weights, parameter_shapes(config.model), origin="the weights to write")
    renamed = to_diffusers(state, config.model)
    with writable(storage, UNET_WEIGHTS, size=sum(4 * tensor.numel() for tensor in renamed.values())) as path:
        save_file(renamed, path, metadata=describe(config, step=step, weights_name=weights_name, tensors=renamed))
    _write_json(storage, UNET_CONFIG, unet_config(config.model))
    _write_json(storage, SCHEDULER_CONFIG, scheduler_config(config.method))
    if card is not None:
        storage.write(CARD, card.encode())
    index = {
        "_class_name": "ConsistencyModelPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    _write_json(storage, INDEX, index)


def check_folder(target: str | Path | Storage, config: Config) -> None:
    """Raises UserError if the folder holds another model than that of a config, which would be replaced."""
    refuse_another_model(folder(target), config, files=_FILES, weights=UNET_WEIGHTS)


def read_diffusers(
    source: str | Path | Storage, *, model: Model | None = None, method: MethodSection | None = None
) -> tuple[Weights, dict[str, str]]:
    """Reads the weights in a folder (a path or `s3://`), with OpenAI's names, and its metadata (see `describe`).

    The weights are those of `weight_files`.

    Args:
        model: The network, for folders that cmscale did not write: they hold no config, and their metadata is {}.
        method: What the folder's scheduler must agree with.

    Raises:
        UserError: the folder is missing or damaged, holds another network, or has no config while `model` is None.
    """
    storage = folder(source)
    raw = storage.read_if_present(UNET_CONFIG)
    if storage.read_if_present(INDEX) is None or raw is None:
        raise UserError(f"{storage.url}: not a diffusers folder; it must hold {INDEX} and {UNET_CONFIG}")
    scheduler = None if method is None else storage.read_if_present(SCHEDULER_CONFIG)
    if method is not None and scheduler is not None:
        check_scheduler(scheduler, method, origin=storage.join(SCHEDULER_CONFIG))
    keys = weight_files(storage)
    origin = storage.join(keys[0] if len(keys) == 1 else "unet")
    found, metadata = read_weights(storage, keys, {} if model is None else _shapes(model))
    card = own_card(metadata)
    if model is None:
        if card is None:
            raise UserError(f"{storage.url}: holds no config, as cmscale did not write it; give --config CONFIG")
        model = parse_config(card["config"], origin=f"config in {origin}", resolved=True).model
    refuse_other_network(raw, model, origin=storage.join(UNET_CONFIG))
    return from_diffusers(strict_weights(found, _shapes(model), origin=origin), model), card or {}


def holds_config(source: Path | Storage) -> bool:
    """Whether a safetensors file, or the one in a diffusers folder, holds a config: whether cmscale wrote it."""
    if isinstance(source, Path):
        return own_card(read_metadata(source, origin=str(source))) is not None
    key, *more = weight_files(source)
    if more or not key.endswith(".safetensors"):
        return False
    with readable(source, key) as path:
        return own_card(read_metadata(path, origin=source.join(key))) is not None


def to_diffusers(weights: Mapping[str, Tensor], model: Model) -> Weights:
    """Converts weights to diffusers' names: qkv split into three, attention's 1x1 convolutions as linear layers."""
    renamed: Weights = {}
    for parameter in parameters(model):
        tensor = weights[parameter.name]
        if parameter.is_qkv:
            tensor = reorder_qkv(
                tensor, head_channels=model.head_channels, source=model.qkv_layout, to="three_heads_dim"
            )
        if parameter.is_pointwise:
            tensor = tensor.flatten(1)
        for name, part in zip(parameter.diffusers, tensor.chunk(len(parameter.diffusers)), strict=True):
            renamed[name] = part.contiguous()
    return renamed


def from_diffusers(weights: Mapping[str, Tensor], model: Model) -> Weights:
    """The inverse of `to_diffusers`, with qkv in the order of `model.qkv_layout`."""
    renamed: Weights = {}
    for parameter in parameters(model):
        tensor = torch.cat([weights[name] for name in parameter.diffusers]).reshape(parameter.shape)
        if parameter.is_qkv:
            tensor = reorder_qkv(
                tensor, head_channels=model.head_channels, source="three_heads_dim", to=model.qkv_layout
            )
        renamed[parameter.name] = tensor.contiguous()
    return renamed


def refuse_another_model(storage: Storage, config: Config, *, files: Collection[str], weights: str) -> None:
    """Refuses to write over files that are not those of an earlier export of the same run.

    Args:
        files: Those that an export writes.
        weights: The one of them whose metadata say what it is.

    Raises:
        UserError: some of the files are there, and are not of such an export.
    """
    there = {name for name in files if has_object(storage, name)}
    if not there:
        return
    if weights in there:
        with readable(storage, weights) as path:
            card = own_card(read_metadata(path, origin=storage.join(weights)))
        if card is not None:
            held = parse_config(card["config"], origin=f"config in {storage.join(weights)}", resolved=True)
            if held.fingerprint() in (config.fingerprint(), published(config).fingerprint()):
                return
    raise UserError(f"{storage.url}: holds another model ({min(there)}), which is not replaced; name another folder")


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {
        name: _diffusers_shape(parameter.shape, parts=len(parameter.diffusers), pointwise=parameter.is_pointwise)
        for parameter in parameters(model)
        for name in parameter.diffusers
    }


def _diffusers_shape(shape: tuple[int, ...], *, parts: int, pointwise: bool) -> tuple[int, ...]:
    shape = (shape[0] // parts, *shape[1:])
    return shape[:2] if pointwise else shape


def _write_json(storage: Storage, key: str, content: dict[str, Any]) -> None:
    storage.write(key, (json.dumps(content, indent=2) + "\n").encode())
