"""Writes pickles as NVlabs' EDM does, and computes its ADM UNet from its published description, in float64."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# Any attribute of an nn.Module may be set and read, which its types do not say.
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stored(nn.Module):
    """A module that is pickled by the name of a class of theirs, with source code and the constructor's arguments."""

    def __init__(self, kind: str, **arguments: Any) -> None:
        super().__init__()
        self._kind = kind
        self._init_args = ()
        self._init_kwargs = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != "_kind"}
        source = "raise SystemExit('the source code in a pickle was executed')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self._kind, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@contextmanager
def their_modules() -> Iterator[None]:
    """Modules of their names, which pickles refer to; nobody else has them."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    modules = {name: types.ModuleType(name) for name in names}

    def reconstruct(meta: Any) -> Any:
        raise AssertionError(meta)

    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct  # pyright: ignore
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util", "__qualname__": "EasyDict"})
    modules["dnnlib.util"].EasyDict = easy  # pyright: ignore
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def write_pickle(path: Path, network: nn.Module, **more: Any) -> Path:
    """A file with the network under `ema`, as their training writes it."""
    with their_modules():
        content = sys.modules["dnnlib.util"].EasyDict(ema=network, **more)
        path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def draw(*shape: int) -> nn.Parameter:
    spread = 0.8 / torch.tensor(shape[1:]).prod().sqrt() if len(shape) > 1 else 0.2
    return nn.Parameter(torch.randn(shape) * spread + (len(shape) == 1))


def layer(kind: str, *shape: int, bias: bool = True) -> Stored:
    found = Stored(kind)
    found.weight, found.bias = draw(*shape), draw(shape[0]) if bias else None
    return found


def block(channels: int, wide: int, emb: int, *, resample: bool = False, attention: bool = False) -> Stored:
    """A residual block: `resample` has the mean of 2 x 2 pixels as filter."""
    found = Stored("UNetBlock", in_channels=channels, out_channels=wide)
    found.in_channels, found.heads = channels, wide // 64 if attention else 0
    found.norm0, found.conv0 = layer("GroupNorm", channels), layer("Conv2d", wide, channels, 3, 3)
    found.affine, found.norm1 = layer("Linear", 2 * wide, emb), layer("GroupNorm", wide)
    found.conv1 = layer("Conv2d", wide, wide, 3, 3)
    found.skip = None
    if channels != wide:
        found.skip = layer("Conv2d", wide, channels, 1, 1)
    elif resample:
        found.skip = Stored("Conv2d")
        found.skip.weight = found.skip.bias = None
    for conv in (found.conv0, found.skip):
        if conv is not None:
            conv.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if resample else None)
    if attention:
        found.norm2, found.qkv = layer("GroupNorm", wide), layer("Conv2d", 3 * wide, wide, 1, 1)
        found.proj = layer("Conv2d", wide, wide, 1, 1)
    return found


def adm_unet(
    *, size: int, width: int, multipliers: list[int], blocks: int, attention: list[int], labels: int, augment: int = 0
) -> Stored:
    """EDM's `DhariwalUNet` with random weights."""
    arguments = {
        "img_resolution": size, "in_channels": 3, "out_channels": 3, "label_dim": labels, "model_channels": width,
        "channel_mult": multipliers, "num_blocks": blocks, "attn_resolutions": attention, "dropout": 0.1,
        "augment_dim": augment,
    }  # fmt: skip
    net = Stored("DhariwalUNet", **arguments)
    emb = 4 * width
    net.map_noise = Stored("PositionalEmbedding", num_channels=width)
    net.map_augment = layer("Linear", width, augment, bias=False) if augment else None
    net.map_layer0, net.map_layer1 = layer("Linear", emb, width), layer("Linear", emb, emb)
    net.map_label = layer("Linear", emb, labels, bias=False) if labels else None
    net.enc, net.dec = nn.ModuleDict(), nn.ModuleDict()
    channels, skips = width * multipliers[0], []
    for level, multiplier in enumerate(multipliers):
        name = f"{size >> level}x{size >> level}"
        if level:
            net.enc[f"{name}_down"] = block(channels, channels, emb, resample=True)
        else:
            net.enc[f"{name}_conv"] = layer("Conv2d", channels, 3, 3, 3)
        skips.append(channels)
        for number in range(blocks):
            wide = width * multiplier
            net.enc[f"{name}_block{number}"] = block(channels, wide, emb, attention=size >> level in attention)
            channels = wide
            skips.append(channels)
    for level in reversed(range(len(multipliers))):
        name = f"{size >> level}x{size >> level}"
        if level == len(multipliers) - 1:
            net.dec[f"{name}_in0"] = block(channels, channels, emb, attention=True)
            net.dec[f"{name}_in1"] = block(channels, channels, emb)
        else:
            net.dec[f"{name}_up"] = block(channels, channels, emb, resample=True)
        for number in range(blocks + 1):
            wide = width * multipliers[level]
            there = block(channels + skips.pop(), wide, emb, attention=size >> level in attention)
            net.dec[f"{name}_block{number}"], channels = there, wide
    net.out_norm, net.out_conv = layer("GroupNorm", channels), layer("Conv2d", 3, channels, 3, 3)
    return net


def preconditioned(net: Stored, *, kind: str = "EDMPrecond", sigma_data: float = 0.5) -> Stored:
    outer = Stored(kind, img_resolution=net._init_kwargs.get("img_resolution"), img_channels=3)
    outer.sigma_data, outer.model = sigma_data, net
    return outer


def denoised(outer: Stored, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """D(x, sigma) of EDM, table 1, with the network of section 5 (arch "adm"); float64."""
    net = outer.model.double()
    x, sigma = x.double(), sigma.double()
    width = net.map_layer0.weight.shape[1]
    frequencies = 10000 ** -(torch.arange(width // 2) / (width // 2)).double()
    angles = (sigma.log() / 4)[:, None] * frequencies
    emb = F.silu(linear(net.map_layer0, torch.cat([angles.cos(), angles.sin()], dim=1)))
    emb = linear(net.map_layer1, emb)
    if labels is not None:
        emb = emb + net.map_label.weight[:, labels].T
    emb = F.silu(emb)
    s, d = sigma[:, None, None, None], outer.sigma_data
    h, skips = x / (s**2 + d**2).sqrt(), []
    for name, part in net.enc.items():
        h = conv(part, h) if name.endswith("_conv") else residual(part, h, emb, halve if "_down" in name else None)
        skips.append(h)
    for name, part in net.dec.items():
        if h.shape[1] != part.in_channels:
            h = torch.cat([h, skips.pop()], dim=1)
        h = residual(part, h, emb, double if "_up" in name else None)
    h = conv(net.out_conv, F.silu(norm(net.out_norm, h)))
    return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * h


def residual(part: Any, x: Tensor, emb: Tensor, resample: Callable[[Tensor], Tensor] | None) -> Tensor:
    h = F.silu(norm(part.norm0, x))
    if resample:
        h, x = resample(h), resample(x)
    h = conv(part.conv0, h)
    scale, shift = linear(part.affine, emb)[:, :, None, None].chunk(2, dim=1)
    h = conv(part.conv1, F.silu(norm(part.norm1, h) * (1 + scale) + shift))
    x = h + (conv(part.skip, x) if part.skip is not None and part.skip.weight is not None else x)
    if not part.heads:
        return x
    batch, channels, height, side = x.shape
    qkv = conv(part.qkv, norm(part.norm2, x)).reshape(batch, part.heads, channels // part.heads, 3, height * side)
    q, k, v = qkv.unbind(3)
    weights = torch.einsum("bhcq,bhck->bhqk", q, k / (channels // part.heads) ** 0.5).softmax(dim=-1)
    return x + conv(part.proj, torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape))


def linear(part: Any, x: Tensor) -> Tensor:
    return F.linear(x, part.weight, part.bias)


def conv(part: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, part.weight, part.bias, padding=part.weight.shape[-1] // 2)


def norm(part: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, min(32, x.shape[1] // 4), part.weight, part.bias, eps=1e-5)


def halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
