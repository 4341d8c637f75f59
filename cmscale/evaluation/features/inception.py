"""The FID Inception of torch-fidelity (the TensorFlow graph of 2015-12-05), with ADM's spatial features.

Images are resized to 299 px by TensorFlow 1's bilinear rule without antialiasing, as in every published FID.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from cmscale.evaluation.features.extractor import FeatureNetwork
from cmscale.io.published import INCEPTION, published_file

_SPATIAL_CHANNELS = 7


class FIDInception(FeatureNetwork):
    """Inception v3 from torch-fidelity's blocks, in its parameter names.

    Features: `pooled` [B, 2048]; `spatial` [B, 2023]: TensorFlow's `mixed_6/conv:0`, which is `Mixed_6d.branch1x1`
    after its ReLU (17 x 17 x 192), the first 7 channels, flattened in NHWC order as in ADM's evaluator; `logits`
    [B, 1008] without the bias, as the Inception Score takes them from TensorFlow's graph (torch-fidelity's
    `logits_unbiased`).
    """

    label = "inception"
    distance_name = "FID"
    width = 2048
    spatial_width = 17 * 17 * _SPATIAL_CHANNELS
    has_logits = True

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE_1(1280)
        self.Mixed_7c = InceptionE_2(2048)
        self.fc = nn.Linear(2048, 1008)
        self._spatial = torch.empty(0)
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del module, inputs
        self._spatial = output[:, :_SPATIAL_CHANNELS]

    @classmethod
    def default_weights(cls) -> Path:
        """torch-fidelity's download in torch hub's cache; one process per node downloads, the others wait."""
        return published_file(INCEPTION)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = images.to(self.fc.weight.dtype)
        x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
        x = (x - 128) / 128
        for name, layer in self.named_children():
            if name != "fc":
                x = layer(x)
        pooled = x.mean(dim=(2, 3))
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)
        self._spatial = torch.empty(0)
        return {"pooled": pooled, "spatial": spatial, "logits": pooled @ self.fc.weight.T}


NETWORK = FIDInception
