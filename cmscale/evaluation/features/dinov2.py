"""DINOv2 (Oquab et al. 2023) without registers, in the parameter names of its published weights.

The weights are read from a local file, as torch.hub (which torch-fidelity uses) would download and run code. Images are
resized to 224 px by antialiased bicubic interpolation and normalised as for ImageNet, as in EDM2's FD-DINOv2 (Karras et
al. 2024, appendix C, with dinov2_vitl14).
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmscale.errors import UserError
from cmscale.evaluation.features.extractor import FeatureNetwork

IMAGE_SIZE = 224
_HEAD_CHANNELS = 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_VARIANTS = {(384, 12): "vits14", (768, 12): "vitb14", (1024, 24): "vitl14", (1536, 40): "vitg14"}


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, width // _HEAD_CHANNELS, _HEAD_CHANNELS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _SwiGLU(nn.Module):
    """The gated MLP of vitg14: two thirds of the hidden width (a multiple of 8), for an equal number of parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class _Block(nn.Module):
    def __init__(self, width: int, *, swiglu: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width)
        self.ls1 = _Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _SwiGLU(width) if swiglu else _MLP(width)
        self.ls2 = _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int, *, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DINOv2(FeatureNetwork):
    """A vision transformer. Features: `pooled` [B, width], the normalised class token.

    Args:
        width, depth: Channels and number of the transformer blocks.
        patch: Side of a patch in pixels.
        side: Side of the position embedding's grid in patches.
        swiglu: Whether the MLPs are gated (vitg14).
    """

    distance_name = "FD-DINOv2"

    def __init__(self, *, width: int, depth: int, patch: int, side: int, swiglu: bool) -> None:
        super().__init__()
        self.width = width
        self.label = f"dinov2_{_VARIANTS.get((width, depth), f'{width}x{depth}')}"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # unused, but part of the weights file
        self.patch_embed = _PatchEmbedding(width, patch=patch)
        self.blocks = nn.ModuleList(_Block(width, swiglu=swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @classmethod
    def default_weights(cls) -> Path:
        raise UserError("features dinov2: no weights; they are published, but nothing downloads them here")

    @classmethod
    def for_weights(cls, weights: Mapping[str, Tensor]) -> "DINOv2":
        """The uninitialised network of the size that the weights have. Raises KeyError if it is no DINOv2."""
        return cls(
            width=weights["cls_token"].shape[-1],
            depth=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
            patch=weights["patch_embed.proj.weight"].shape[-1],
            side=math.isqrt(weights["pos_embed"].shape[1] - 1),
            swiglu="blocks.0.mlp.w12.weight" in weights,
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = images.to(self.cls_token.dtype)
        x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True) / 255
        mean, std = x.new_tensor(_MEAN).view(3, 1, 1), x.new_tensor(_STD).view(3, 1, 1)
        return {"pooled": self.class_token((x - mean) / std)}

    def class_token(self, x: Tensor) -> Tensor:
        """Class tokens [B, width] of normalised images [B, 3, H, W]; H and W are multiples of the patch size."""
        patches = self.patch_embed(x)
        height, width = (side // self.patch_embed.proj.stride[0] for side in x.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self._positions(height, width)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def _positions(self, height: int, width: int) -> Tensor:
        """The position embedding for a grid of patches.

        Bicubic, with the scale of a grid 0.1 patches larger, as in the published code.
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (side, side):
            return self.pos_embed
        class_position, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.view(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        resized = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        assert resized.shape[-2:] == (height, width), f"{tuple(resized.shape)} for {height} x {width} patches"
        return torch.cat([class_position, resized.flatten(2).transpose(1, 2)], dim=1)


NETWORK = DINOv2
