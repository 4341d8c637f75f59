"""Lists the names and shapes of the network's parameters in OpenAI's and diffusers' formats, from the config."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cmscale.config import Model

Layout = Literal["three_heads_dim", "heads_three_dim"]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the network.

    Attributes:
        name: OpenAI's name.
        diffusers: diffusers' name; a qkv projection has three, one each for query, key and value.
        is_pointwise: Whether it is the weight of a 1x1 convolution that is a linear layer in diffusers.
    """

    name: str
    shape: tuple[int, ...]
    diffusers: tuple[str, ...]
    is_pointwise: bool = False

    @property
    def is_qkv(self) -> bool:
        """Whether diffusers has three parameters in its place: query, key and value."""
        return len(self.diffusers) == 3


def parameters(model: Model) -> Iterator[Parameter]:
    """Yields every parameter of the network, in the order of its state dict."""
    width = model.channels
    yield from _layer("time_embed.0", "time_embedding.linear_1", (4 * width, width))
    yield from _layer("time_embed.2", "time_embedding.linear_2", (4 * width, 4 * width))
    if model.num_classes is not None:
        yield Parameter("label_emb.weight", (model.num_classes, 4 * width), ("class_embedding.weight",))
    channels = width * model.channel_multipliers[0]
    yield from _layer("input_blocks.0.0", "conv_in", (channels, 3, 3, 3))
    skips = [channels]
    yield from _input_side(model, skips)
    channels = skips[-1]
    yield from _resblock("middle_block.0", "mid_block.resnets.0", channels, channels, model)
    yield from _attention("middle_block.1", "mid_block.attentions.0", channels)
    yield from _resblock("middle_block.2", "mid_block.resnets.1", channels, channels, model)
    yield from _output_side(model, skips)
    channels = width * model.channel_multipliers[0]
    yield from _layer("out.0", "conv_norm_out", (channels,))
    yield from _layer("out.2", "conv_out", (3, channels, 3, 3))


def _input_side(model: Model, skips: list[int]) -> Iterator[Parameter]:
    """The levels from the full size down; appends the output channels of each stage to `skips`."""
    stage = 1
    for level, multiplier in enumerate(model.channel_multipliers):
        there = f"down_blocks.{level}"
        wide = multiplier * model.channels
        for block in range(model.num_res_blocks):
            yield from _resblock(f"input_blocks.{stage}.0", f"{there}.resnets.{block}", skips[-1], wide, model)
            if attends(model, level):
                yield from _attention(f"input_blocks.{stage}.1", f"{there}.attentions.{block}", wide)
            skips.append(wide)
            stage += 1
        if level < len(model.channel_multipliers) - 1:
            here, there = f"input_blocks.{stage}.0", f"{there}.downsamplers.0"
            if model.resblock_updown:
                yield from _resblock(here, there, wide, wide, model)
            else:
                yield from _layer(f"{here}.op", f"{there}.conv", (wide, wide, 3, 3))
            skips.append(wide)
            stage += 1


def _output_side(model: Model, skips: list[int]) -> Iterator[Parameter]:
    """The levels from the smallest size up; each stage removes the last of `skips`."""
    levels = len(model.channel_multipliers)
    channels = skips[-1]
    stage = 0
    for level in reversed(range(levels)):
        there = f"up_blocks.{levels - 1 - level}"
        wide = model.channel_multipliers[level] * model.channels
        for block in range(model.num_res_blocks + 1):
            here = f"output_blocks.{stage}"
            yield from _resblock(f"{here}.0", f"{there}.resnets.{block}", channels + skips.pop(), wide, model)
            channels = wide
            if attends(model, level):
                yield from _attention(f"{here}.1", f"{there}.attentions.{block}", wide)
            stage += 1
        if level:
            here = f"output_blocks.{stage - 1}.{2 if attends(model, level) else 1}"
            if model.resblock_updown:
                yield from _resblock(here, f"{there}.upsamplers.0", wide, wide, model)
            else:
                yield from _layer(f"{here}.conv", f"{there}.upsamplers.0.conv", (wide, wide, 3, 3))


def attends(model: Model, level: int) -> bool:
    """Whether the blocks of a level (0 has the full image size) have attention."""
    return model.image_size >> level in model.attention_resolutions


def _layer(here: str, there: str, shape: tuple[int, ...], *, pointwise: bool = False) -> Iterator[Parameter]:
    """A weight of that shape, and a bias."""
    yield Parameter(f"{here}.weight", shape, (f"{there}.weight",), is_pointwise=pointwise)
    yield Parameter(f"{here}.bias", shape[:1], (f"{there}.bias",))


def _resblock(here: str, there: str, channels: int, wide: int, model: Model) -> Iterator[Parameter]:
    embedded = 2 * wide if model.scale_shift_norm else wide
    yield from _layer(f"{here}.in_layers.0", f"{there}.norm1", (channels,))
    yield from _layer(f"{here}.in_layers.2", f"{there}.conv1", (wide, channels, 3, 3))
    yield from _layer(f"{here}.emb_layers.1", f"{there}.time_emb_proj", (embedded, 4 * model.channels))
    yield from _layer(f"{here}.out_layers.0", f"{there}.norm2", (wide,))
    yield from _layer(f"{here}.out_layers.3", f"{there}.conv2", (wide, wide, 3, 3))
    if channels != wide:
        yield from _layer(f"{here}.skip_connection", f"{there}.conv_shortcut", (wide, channels, 1, 1))


def _attention(here: str, there: str, channels: int) -> Iterator[Parameter]:
    yield from _layer(f"{here}.norm", f"{there}.group_norm", (channels,))
    for kind, shape in (("weight", (3 * channels, channels, 1, 1)), ("bias", (3 * channels,))):
        names = tuple(f"{there}.to_{part}.{kind}" for part in "qkv")
        yield Parameter(f"{here}.qkv.{kind}", shape, names, is_pointwise=kind == "weight")
    yield from _layer(f"{here}.proj_out", f"{there}.to_out.0", (channels, channels, 1, 1), pointwise=True)


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in OpenAI's format."""
    return {parameter.name: parameter.shape for parameter in parameters(model)}


def reorder_qkv(tensor: Tensor, *, head_channels: int, source: Layout, to: Layout) -> Tensor:
    """Reorders the first axis of a qkv weight or bias [3 heads dim, ...] from layout `source` to layout `to`."""
    if source == to:
        return tensor
    heads = len(tensor) // (3 * head_channels)
    first = (3, heads) if source == "three_heads_dim" else (heads, 3)
    return tensor.reshape(*first, head_channels, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
