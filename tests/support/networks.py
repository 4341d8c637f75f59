"""Defines small networks for tests, random weights for them, and the UNet in float64 numpy as reference."""

import functools
from typing import Any

import numpy as np
import torch

from cmscale.config import Config, Model
from cmscale.interop.names import parameter_shapes

VARIANTS: dict[str, dict[str, Any]] = {
    "as LSUN 256": {
        "image_size": 16,
        "channels": 32,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 2,
        "attention_resolutions": (8,),
        "head_channels": 32,
    },
    "as ImageNet 64": {
        "image_size": 16,
        "channels": 32,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (16, 8),
        "head_channels": 16,
        "scale_shift_norm": True,
        "num_classes": 5,
    },
    "sampling by convolution": {
        "image_size": 16,
        "channels": 32,
        "channel_multipliers": (1, 1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4, 16),
        "head_channels": 16,
        "resblock_updown": False,
    },
    "older qkv": {
        "image_size": 8,
        "channels": 32,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "head_channels": 16,
        "qkv_layout": "heads_three_dim",
    },
}


def small_model(variant: str = "as LSUN 256", **changes: Any) -> Model:
    return Model.model_validate({**VARIANTS[variant], **changes})


def small_config(model: Model, method: dict[str, Any] | None = None) -> Config:
    return Config.model_validate(
        {
            "method": method or {"kind": "ct"},
            "model": model.model_dump(),
            "data": {"path": "s3://bucket/data"},
            "optimizer": {"learning_rate": 1e-4},
            "train": {"total_steps": 100, "global_batch_size": 8, "micro_batch_size": 4},
        }
    )


def random_weights(model: Model, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights without zeros, scaled so that activations keep their size; gains of norms are near 1."""
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(model).items():
        drawn = torch.randn(shape, generator=source)
        if len(shape) > 1:
            weights[name] = drawn * 0.8 / np.sqrt(np.prod(shape[1:]))
        else:
            weights[name] = 0.2 * drawn + float(name.endswith("weight"))
    return weights


class NumpyNetwork:
    """The ADM UNet from its published description in float64, one formula per method."""

    def __init__(self, model: Model, weights: dict[str, torch.Tensor]) -> None:
        self.model = model
        self.weights = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def __call__(self, x: np.ndarray, c_noise: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        half = self.model.channels // 2
        angles = c_noise[:, None] * np.exp(-np.log(10000) * np.arange(half) / half)
        embedding = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        embedding = self.linear("time_embed.2", silu(self.linear("time_embed.0", embedding)))
        if labels is not None:
            embedding = embedding + self.weights["label_emb.weight"][labels]
        skips = []
        for stage in self.stages("input_blocks"):
            x = self.blocks(stage, x, embedding)
            skips.append(x)
        x = self.blocks("middle_block", x, embedding)
        for stage in self.stages("output_blocks"):
            x = self.blocks(stage, np.concatenate([x, skips.pop()], axis=1), embedding)
        return self.conv("out.2", silu(self.norm("out.0", x)))

    def stages(self, side: str) -> list[str]:
        numbers = {int(name.split(".")[1]) for name in self.weights if name.startswith(side)}
        return [f"{side}.{number}" for number in sorted(numbers)]

    def blocks(self, stage: str, x: np.ndarray, embedding: np.ndarray) -> np.ndarray:
        """Recognises a block's type by its parameter names, and resampling by its position."""
        depth = stage.count(".") + 1
        names = {name.split(".")[depth] for name in self.weights if name.startswith(f"{stage}.")}
        for number in sorted(names):
            block = f"{stage}.{number}"
            if f"{block}.in_layers.0.weight" in self.weights:
                x = self.resblock(block, x, embedding, self.resampling(stage, int(number)))
            elif f"{block}.qkv.weight" in self.weights:
                x = self.attention(block, x)
            elif f"{block}.op.weight" in self.weights:
                x = self.conv(f"{block}.op", x)[:, :, ::2, ::2]
            elif f"{block}.conv.weight" in self.weights:
                x = self.conv(f"{block}.conv", double(x))
            else:
                x = self.conv(block, x)
        return x

    def resampling(self, stage: str, number: int) -> str | None:
        per_level = self.model.num_res_blocks + 1
        side, _, position = stage.partition(".")
        if side == "input_blocks":
            return "halve" if int(position) > 0 and int(position) % per_level == 0 else None
        return "double" if side == "output_blocks" and number > 0 else None

    def resblock(self, block: str, x: np.ndarray, embedding: np.ndarray, resampling: str | None) -> np.ndarray:
        h = silu(self.norm(f"{block}.in_layers.0", x))
        if resampling is not None:
            resample = {"halve": halve, "double": double}[resampling]
            h, x = resample(h), resample(x)
        h = self.conv(f"{block}.in_layers.2", h)
        embedded = self.linear(f"{block}.emb_layers.1", silu(embedding))[:, :, None, None]
        if self.model.scale_shift_norm:
            scale, shift = np.split(embedded, 2, axis=1)
            h = self.norm(f"{block}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{block}.out_layers.0", h + embedded)
        skip = self.conv(f"{block}.skip_connection", x) if f"{block}.skip_connection.weight" in self.weights else x
        return skip + self.conv(f"{block}.out_layers.3", silu(h))

    def attention(self, block: str, x: np.ndarray) -> np.ndarray:
        batch, channels, height, width = x.shape
        dim = self.model.head_channels
        qkv = self.conv(f"{block}.qkv", self.norm(f"{block}.norm", x)).reshape(batch, 3 * channels, height * width)
        per_head = []
        for head in range(channels // dim):
            if self.model.qkv_layout == "three_heads_dim":
                starts = [part * channels + head * dim for part in range(3)]
            else:
                starts = [(3 * head + part) * dim for part in range(3)]
            q, k, v = (qkv[:, start : start + dim] for start in starts)
            scores = np.einsum("bcq,bck->bqk", q, k) / np.sqrt(dim)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            per_head.append(np.einsum("bqk,bck->bcq", weights / weights.sum(axis=-1, keepdims=True), v))
        h = np.concatenate(per_head, axis=1).reshape(x.shape)
        return x + self.conv(f"{block}.proj_out", h)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def conv(self, name: str, x: np.ndarray) -> np.ndarray:
        """Convolution with stride 1 that keeps the image size."""
        kernel = self.weights[f"{name}.weight"]
        margin = kernel.shape[-1] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[2:], axis=(2, 3))  # pyright: ignore
        product = np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)
        return product + self.weights[f"{name}.bias"][:, None, None]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """Normalises 32 groups of neighbouring channels to mean 0 and variance 1."""
        groups = x.reshape(len(x), 32, -1)
        centred = groups - groups.mean(axis=-1, keepdims=True)
        normal = (centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)).reshape(x.shape)
        return normal * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def double(x: np.ndarray) -> np.ndarray:
    return x.repeat(2, axis=2).repeat(2, axis=3)


def halve(x: np.ndarray) -> np.ndarray:
    corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return functools.reduce(np.add, corners) / 4


def relative(found: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """The largest difference, relative to the largest expected value."""
    a, b = (np.asarray(torch.as_tensor(value).detach().double()) for value in (found, expected))
    return float(np.abs(a - b).max() / np.abs(b).max())
