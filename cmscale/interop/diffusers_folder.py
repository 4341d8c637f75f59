"""Reads and writes the folder of diffusers' ConsistencyModelPipeline, without importing diffusers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cmscale.config import Config, MethodSection, Model, parse_config
from cmscale.errors import UserError
from cmscale.interop.files import folder, readable, writable
from cmscale.interop.names import Weights, attends, parameter_shapes, parameters, reorder_qkv
from cmscale.interop.safetensors_file import describe, load_with_metadata, own_card
from cmscale.interop.strict import strict_weights
from cmscale.io.storage import Storage

INDEX = "model_index.json"
UNET_CONFIG = "unet/config.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
CARD = "README.md"
VERSION = "0.39.0"  # the diffusers version of these formats
DEFAULT_SCALES = 40  # grid size for methods without a grid; the scheduler needs one for its multistep times


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
        UserError: the weights are not those of `config.model`, or diffusers can't express the network or the method.
    """
    storage = folder(target)
    _refuse_inexpressible(config, storage.url)
    state = strict_weights(weights, parameter_shapes(config.model), origin="the weights to write")
    renamed = to_diffusers(state, config.model)
    with writable(storage, UNET_WEIGHTS, size=sum(4 * tensor.numel() for tensor in renamed.values())) as path:
        save_file(renamed, path, metadata=describe(config, step=step, weights_name=weights_name))
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


def read_diffusers(source: str | Path | Storage, *, model: Model | None = None) -> tuple[Weights, dict[str, str]]:
    """Reads the weights in a folder (a path or `s3://`), with OpenAI's names, and its metadata (see `describe`).

    Args:
        model: The network, for folders that cmscale did not write: they hold no config, and their metadata is {}.

    Raises:
        UserError: the folder is missing or damaged, holds another network, or has no config while `model` is None.
    """
    storage = folder(source)
    raw = storage.read_if_present(UNET_CONFIG)
    if storage.read_if_present(INDEX) is None or raw is None:
        raise UserError(f"{storage.url}: not a diffusers folder; it must hold {INDEX} and {UNET_CONFIG}")
    origin = storage.join(UNET_WEIGHTS)
    with readable(storage, UNET_WEIGHTS) as path:
        found, metadata = load_with_metadata(path, origin=origin)
        card = own_card(metadata)
        if model is None:
            if card is None:
                raise UserError(f"{storage.url}: holds no config, as cmscale did not write it; give --config CONFIG")
            model = parse_config(card["config"], origin=f"config in {origin}").model
        _refuse_other_network(raw, model, origin=storage.join(UNET_CONFIG))
        shapes = {
            name: _diffusers_shape(parameter.shape, parts=len(parameter.diffusers), pointwise=parameter.is_pointwise)
            for parameter in parameters(model)
            for name in parameter.diffusers
        }
        return from_diffusers(strict_weights(found, shapes, origin=origin), model), card or {}


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


def unet_config(model: Model) -> dict[str, Any]:
    """The options with which diffusers' UNet2DModel is this network."""
    levels = range(len(model.channel_multipliers))
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    if not model.resblock_updown:
        plain = ("DownBlock2D", "UpBlock2D")
    down = ["AttnDownBlock2D" if attends(model, level) else plain[0] for level in levels]
    up = ["AttnUpBlock2D" if attends(model, level) else plain[1] for level in reversed(levels)]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": model.image_size,
        "in_channels": 3,
        "out_channels": 3,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [model.channels * multiplier for multiplier in model.channel_multipliers],
        "layers_per_block": model.num_res_blocks,
        "downsample_padding": 1,
        "downsample_type": "resnet" if model.resblock_updown else "conv",
        "upsample_type": "resnet" if model.resblock_updown else "conv",
        "dropout": 0.0,
        "act_fn": "silu",
        "attention_head_dim": model.head_channels,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "num_class_embeds": model.num_classes,
    }


def scheduler_config(method: MethodSection) -> dict[str, Any]:
    """The options of diffusers' CMStochasticIterativeScheduler, with the final time grid of the training."""
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": method.final_num_scales or DEFAULT_SCALES,
        # with 0 the scheduler's preconditioning is EDM's, which methods with the boundary at 0 use
        "sigma_min": 0.0 if method.facts.boundary_at_zero else method.sigma_min,
        "sigma_max": method.sigma_max,
        "sigma_data": method.sigma_data,
        "rho": method.rho,
        "s_noise": 1.0,
        "clip_denoised": True,
    }


def _refuse_inexpressible(config: Config, url: str) -> None:
    if not config.method.facts.is_consistency_model:
        kind = config.method.kind.upper()
        raise UserError(f"{url}: diffusers has no pipeline for {kind}, only for consistency models; use safetensors")
    if config.method.embeds_angle:
        raise UserError(f"{url}: diffusers can't compute the time embedding of this sCT model; use safetensors")
    if config.model.channel_multipliers[0] != 1:
        raise UserError(
            f"{url}: model.channel_multipliers starts with {config.model.channel_multipliers[0]}, but in diffusers the "
            "first level and the time embedding have the same width (multiplier 1); use safetensors"
        )


def _refuse_other_network(raw: bytes, model: Model, *, origin: str) -> None:
    """Checks what shapes do not show: heads, kinds of blocks, norms."""
    try:
        given = json.loads(raw)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError(f"{origin}: not a JSON object; restore the file that diffusers wrote")
    for name, value in unet_config(model).items():
        if name.startswith("_") or name == "dropout" or name not in given:
            continue
        if given[name] != value:
            raise UserError(
                f"{origin}: {name} is {given[name]}, but {value} in the config's model section; give a matching config"
            )


def _diffusers_shape(shape: tuple[int, ...], *, parts: int, pointwise: bool) -> tuple[int, ...]:
    shape = (shape[0] // parts, *shape[1:])
    return shape[:2] if pointwise else shape


def _write_json(storage: Storage, key: str, content: dict[str, Any]) -> None:
    storage.write(key, (json.dumps(content, indent=2) + "\n").encode())
