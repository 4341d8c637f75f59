"""Defines the parts of the UNet: normalisation, time embedding, keyed dropout, residual and attention blocks."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmscale.model import float32
from cmscale.model.attention import Kind, Layout, attend, split_qkv
from cmscale.rng import DropoutKeys, PhiloxKeys, key

NORM_GROUPS = 32


@functools.lru_cache(maxsize=16)
def _frequencies(half: int, device: torch.device) -> Tensor:
    """10000^(-i/half) for i < half; computed on the CPU, so that they are equal on every device."""
    with torch.inference_mode(False):
        exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device="cpu") / half
        return torch.exp(exponents).to(device)


def timestep_embedding(c_noise: Tensor, dim: int) -> Tensor:
    """Sinusoids of [B] values, [B, dim] float32: cosines, then sines, with periods from 2 pi to 20,000 pi."""
    angles = c_noise.float()[:, None] * _frequencies(dim // 2, c_noise.device)[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class GroupNorm(float32.Float32Layer, nn.GroupNorm):
    """Group normalisation with 32 groups, computed in float32 for any dtype of parameters and input."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
            return self._channels_last(input)
        normal = F.group_norm(input.float(), self.num_groups, self.value("weight"), self.value("bias"), self.eps)
        return normal.to(input.dtype)

    def _channels_last(self, input: Tensor) -> Tensor:
        """The kernel for CUDA takes and returns channels first: the casts, which copy anyway, change the order."""
        order = torch.contiguous_format if input.is_cuda else torch.channels_last
        x = input.to(torch.float32, memory_format=order)
        normal = F.group_norm(x, self.num_groups, self.value("weight"), self.value("bias"), self.eps)
        return normal.to(input.dtype, memory_format=torch.channels_last)


def keyed_dropout(x: Tensor, rate: float, *, keys: DropoutKeys, layer: int) -> Tensor:
    """Dropout on [B, ...], where the mask of sample i is a function of its key and the layer; see `mask`.

    Two networks with the same keys therefore drop the same elements, in any batch and dtype, and activation
    checkpointing repeats the mask. The released code restores the CPU generator instead, which has no effect on CUDA.

    Raises:
        ValueError: see `mask`.
    """
    return dropped(x, rate, keep=mask(x.shape, rate, keys=keys, layer=layer, device=x.device))


def mask(shape: Sequence[int], rate: float, *, keys: DropoutKeys, layer: int, device: torch.device) -> Tensor:
    """Which elements of `shape` [B, ...] stay: for sample i a function of its key and the layer.

    Keys that are numbers seed torch's generators, which differ between the types of devices.

    Raises:
        ValueError: the number of keys is not the batch size.
    """
    if len(keys) != shape[0]:
        raise ValueError(f"dropout_keys: {len(keys)} keys for a batch of {shape[0]}; give one per sample")
    if isinstance(keys, PhiloxKeys):
        return keys.kept(shape[1:], rate, layer=layer)
    keep = torch.empty(shape, dtype=torch.bool, device=device)
    if not keep.is_meta:  # there, where shapes alone are computed, are no generators
        source = torch.Generator(device=device)
        for row, sample_key in zip(keep, keys, strict=True):
            source.manual_seed(key(sample_key, layer))
            torch.ge(torch.rand(row.shape, generator=source, device=device), rate, out=row)
    return keep


def dropped(x: Tensor, rate: float, *, keep: Tensor) -> Tensor:
    """x / (1 - rate) where `keep` is true, else 0."""
    return torch.where(keep, x / (1 - rate), torch.zeros((), dtype=x.dtype, device=x.device))


class Block(nn.Module):
    """A block that the backward pass computes again if `activation_checkpointing` is set.

    Subclasses compute in `_body`, which a compiled function of the same arguments may replace: it takes tensors or
    None, draws no random numbers, and has no branch on anything that changes from step to step.
    """

    activation_checkpointing: bool
    _compiled: Callable[..., Tensor] | None = None

    def use_compiled(self, body: Callable[..., Tensor]) -> None:
        """Computes with `body(block, ...)` in place of `_body`."""
        self._compiled = body

    def _computed(self, *inputs: Tensor | None) -> Tensor:
        if self._compiled is not None:
            return self._compiled(self, *inputs)
        return self._body(*inputs)  # type: ignore[operator]

    def _run(self, function: Callable[..., Tensor], *inputs: object) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return function(*inputs)
        # Blocks use no global generator, so its state is not saved. ZeRO-3 needs the reentrant variant: the other one
        # recomputes inside a backward hook, after which DeepSpeed has released the weights that backward needs.
        partitioned = hasattr(next(self.parameters(), None), "ds_tensor")
        return checkpoint(function, *inputs, use_reentrant=partitioned, preserve_rng_state=False)  # pyright: ignore


class Upsample(nn.Module):
    """Doubles height and width by nearest neighbour, then applies a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Doubles height and width of [B, C, H, W]."""
        return self.conv(double(x))


class Downsample(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Halves height and width of [B, C, H, W]."""
        return self.op(x)


def double(x: Tensor) -> Tensor:
    """Doubles height and width by nearest neighbour."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def halve(x: Tensor) -> Tensor:
    """Halves height and width by the mean of 2x2 pixels."""
    return F.avg_pool2d(x, 2)


class ResBlock(Block):
    """Residual block: twice norm, SiLU and convolution, with the time embedding added in between.

    Args:
        layer: The block's number in the network, which is part of the key of its dropout masks.
        linear: The class of the layer that the time embedding passes.
        resample: `double` or `halve`, applied before the first convolution and to the skip connection; or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        layer: int,
        dropout: float,
        scale_shift_norm: bool,
        activation_checkpointing: bool,
        linear: type[nn.Linear],
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = dropout
        self.scale_shift_norm = scale_shift_norm
        self.activation_checkpointing = activation_checkpointing
        self.resample = resample
        embedded = 2 * out_channels if scale_shift_norm else out_channels
        self.in_layers = nn.Sequential(
            GroupNorm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(embedding_channels, embedded))
        # position 2 is the dropout module of OpenAI's network; keyed dropout needs no module
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, dropout_keys: DropoutKeys | None = None) -> Tensor:
        return self._run(self._forward, x, embedding, dropout_keys)

    def _forward(self, x: Tensor, embedding: Tensor, dropout_keys: DropoutKeys | None) -> Tensor:
        keep = None
        if self.dropout > 0 and self.training and dropout_keys is not None:
            keep = self._mask(x, dropout_keys)  # not by compiled code: it draws random numbers
        return self._computed(x, embedding, keep)

    def _mask(self, x: Tensor, keys: DropoutKeys) -> Tensor:
        """Which elements before the last convolution stay."""
        height, width = x.shape[2:]
        if self.resample is double:
            height, width = 2 * height, 2 * width
        elif self.resample is halve:
            height, width = height // 2, width // 2
        conv = self.out_layers[-1]
        assert isinstance(conv, nn.Conv2d)
        shape = (len(x), conv.in_channels, height, width)
        return mask(shape, self.dropout, keys=keys, layer=self.layer, device=x.device)

    def _body(self, x: Tensor, embedding: Tensor, keep: Tensor | None) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        embedded = self.emb_layers(embedding).to(h.dtype)[:, :, None, None]
        norm, activation, _, conv = self.out_layers
        if self.scale_shift_norm:
            scale, shift = embedded.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + embedded)
        h = activation(h)
        if keep is not None:
            h = dropped(h, self.dropout, keep=keep)
        return self.skip_connection(x) + conv(h)


class AttentionBlock(Block):
    """Self-attention over all positions, with a residual connection."""

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int,
        layout: Layout,
        kind: Kind,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.layout: Layout = layout
        self.kind: Kind = kind
        self.activation_checkpointing = activation_checkpointing
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        return self._computed(x)

    def _body(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2)
        query, key_, value = split_qkv(qkv, num_heads=self.num_heads, layout=self.layout)
        h = attend(query, key_, value, kind=self.kind)  # [B, S, heads, dim]
        return x + self.proj_out(h.flatten(2).transpose(1, 2).reshape(x.shape))


class Stage(nn.ModuleList):
    """A sequence of blocks; residual blocks also receive the embedding and the dropout keys."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(blocks)

    def forward(self, input: Tensor, embedding: Tensor, dropout_keys: DropoutKeys | None = None) -> Tensor:
        for block in self:
            input = block(input, embedding, dropout_keys) if isinstance(block, ResBlock) else block(input)
        return input
