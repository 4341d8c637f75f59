"""States a network and a method in the terms of diffusers' configs, and checks theirs against them."""

from collections.abc import Sequence
from typing import Any

from cmscale.config import NOISE_EMBEDDING_SCALE, Config, MethodSection, Model
from cmscale.errors import UserError
from cmscale.interop.names import attends
from cmscale.io.json_text import parse_json

VERSION = "0.39.0"  # the diffusers version of these formats
DEFAULT_SCALES = 40  # grid size for methods without a grid; the scheduler needs one for its multistep times

_UNET_AS_BY_DEFAULT: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "add_attention": True,
}
"""Options of UNet2DModel that every network here has at diffusers' defaults."""

_UNET_DEFAULTS: dict[str, Any] = {
    **_UNET_AS_BY_DEFAULT,
    "sample_size": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "class_embed_type": None,
}
"""What diffusers takes for an option of UNet2DModel that a folder does not state."""

_SCHEDULER_DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}


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
        **_UNET_AS_BY_DEFAULT,
        "sample_size": model.image_size,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [model.channels * multiplier for multiplier in model.channel_multipliers],
        "layers_per_block": model.num_res_blocks,
        "downsample_type": "resnet" if model.resblock_updown else "conv",
        "upsample_type": "resnet" if model.resblock_updown else "conv",
        "dropout": 0.0,
        "attention_head_dim": model.head_channels,
        "attn_norm_num_groups": 32,
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


def pipeline_timesteps(method: MethodSection, sigmas: Sequence[float]) -> tuple[list[int], list[float]]:
    """The `timesteps` with which diffusers' pipeline samples nearest to descending times.

    They count through the scheduler's Karras grid, whose end, 0, is sigma_max.

    Returns:
        The timesteps, descending, as the pipeline takes them; and the times that they are, descending.
    """
    scheduler = scheduler_config(method)
    last, power = scheduler["num_train_timesteps"] - 1, 1 / scheduler["rho"]
    high, low = scheduler["sigma_max"] ** power, scheduler["sigma_min"] ** power
    numbers = [round(last * (high - sigma**power) / (high - low)) for sigma in sigmas]
    times = [(high + number / last * (low - high)) ** scheduler["rho"] for number in numbers]
    return numbers[::-1], times


def refuse_inexpressible(config: Config, url: str) -> None:
    """Raises UserError if diffusers can't compute what the weights of a config mean."""
    if not config.method.facts.is_consistency_model:
        kind = config.method.kind.upper()
        raise UserError(f"{url}: diffusers has no pipeline for {kind}, only for consistency models; use safetensors")
    if config.method.embeds_angle:
        raise UserError(f"{url}: diffusers can't compute the time embedding of this sCT model; use safetensors")
    if config.model.noise_embedding_scale != NOISE_EMBEDDING_SCALE:
        raise UserError(
            f"{url}: diffusers' pipeline scales the time embedding by {NOISE_EMBEDDING_SCALE:g}, this network by "
            f"{config.model.noise_embedding_scale:g}; use safetensors"
        )
    if config.model.channel_multipliers[0] != 1:
        raise UserError(
            f"{url}: model.channel_multipliers starts with {config.model.channel_multipliers[0]}, but in diffusers the "
            "first level and the time embedding have the same width (multiplier 1); use safetensors"
        )


def refuse_other_network(raw: bytes, model: Model, *, origin: str) -> None:
    """Checks what shapes do not show: heads, kinds of blocks, norms."""
    stated = json_object(raw, origin=origin)
    given = _UNET_DEFAULTS | stated
    if given["attn_norm_num_groups"] is None and given["resnet_time_scale_shift"] == "default":
        given["attn_norm_num_groups"] = given["norm_num_groups"]  # as diffusers' middle block does
    if given["sample_size"] in (None, [model.image_size] * 2):
        given["sample_size"] = model.image_size
    for name, value in unet_config(model).items():
        if name.startswith("_") or name == "dropout":
            continue
        if given[name] != value:
            shown = f"{given[name]}"[:200] + ("" if name in stated else " (diffusers' default)")
            raise UserError(
                f"{origin}: {name} is {shown}, but {value} in the config's model section; give a matching config"
            )
    if given["class_embed_type"] is not None:
        raise UserError(f"{origin}: class_embed_type is {str(given['class_embed_type'])[:200]}; only null is supported")


def check_scheduler(raw: bytes, method: MethodSection, *, origin: str) -> None:
    """Checks that the config of a scheduler has the noise range and the preconditioning of a method.

    Raises:
        UserError: it has another one, with which the same weights are another function.
    """
    given, expected = json_object(raw, origin=origin), scheduler_config(method)
    if given.get("_class_name") != expected["_class_name"]:
        return
    for key, default in _SCHEDULER_DEFAULTS.items():
        value = given.get(key, default)
        if value != expected[key]:
            shown = f"{value:g}" if isinstance(value, int | float) else repr(value)
            raise UserError(
                f"{origin}: {key} is {shown}, but {expected[key]:g} by the config's method "
                f"section; give a matching config"
            )


def json_object(raw: bytes, *, origin: str) -> dict[str, Any]:
    """The object in JSON text. Raises UserError if it is anything else."""
    try:
        given = parse_json(raw)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError(f"{origin}: not a JSON object; restore the file that diffusers wrote")
    return given
