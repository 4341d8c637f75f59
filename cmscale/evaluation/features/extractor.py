"""Turns images into features by a network that is found by the name of its module in this folder.

  extractor = build_features("inception", weights="weights-inception-2015-12-05-6726825d.pth", device=device)
  features = extractor(images)  # uint8 [N, 3, H, W]
  features["pooled"], features["spatial"], features["logits"]  # [N, 2048], [N, 2023], [N, 1008]

A module of this folder defines one network: a subclass of `FeatureNetwork`, which it exports as `NETWORK`.
"""

import hashlib
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from cmscale.config.features import PACKAGE, known_network
from cmscale.errors import UserError
from cmscale.io.reading import reason

Features = Mapping[str, np.ndarray]
"""float32 arrays: `pooled` [N, width]; some networks add `spatial` [N, spatial_width] and `logits` [N, classes]."""

CHUNK_SIZE = {"cpu": 10, "cuda": 128}
"""Images per forward pass. Fixed, because the rounding of a convolution may depend on its batch size."""


class FeatureNetwork(nn.Module):
    """Maps uint8 images [B, 3, H, W] to named features on the same device; preprocessing included.

    Attributes:
        label: The name of these features in results and reference files; it names the variant of the network.
        distance_name: The name of the Fréchet distance over the pooled features.
        width: Number of pooled features.
        spatial_width: Number of spatial features (for sFID); None if the network has none.
        has_logits: Whether the network classifies, as the Inception Score requires.
    """

    label: str
    distance_name: str
    width: int
    spatial_width: int | None = None
    has_logits: bool = False

    @classmethod
    def default_weights(cls) -> Path:
        """The weights file that is used if none is named: a download, or part of a package.

        Raises:
            UserError: there is no such file, and why. `build_features` adds how to name one.
        """
        raise NotImplementedError

    @classmethod
    def for_weights(cls, weights: Mapping[str, Tensor]) -> Self:
        """The uninitialised network that these weights fit.

        Raises:
            Exception: any, if no such network has these weights.
        """
        del weights
        return cls()

    def prepare(self) -> None:
        """Simplifies the network for inference, once its weights are loaded."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images [B, 3, H, W]: `pooled`, and `spatial` and `logits` if the network has them."""
        raise NotImplementedError


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network with its weights, on a device.

    Attributes:
        weights_sha256: Hash of the weights file.
    """

    network: FeatureNetwork
    weights_sha256: str
    device: torch.device

    @property
    def label(self) -> str:
        """The network's name in results."""
        return self.network.label

    @property
    def distance_name(self) -> str:
        """What the Fréchet distance over its features is called."""
        return self.network.distance_name

    @property
    def width(self) -> int:
        """The number of pooled features."""
        return self.network.width

    @property
    def spatial_width(self) -> int | None:
        """The number of spatial features; None if it has none."""
        return self.network.spatial_width

    def __call__(self, images: Tensor) -> dict[str, np.ndarray]:
        """Features of uint8 images [N, 3, H, W], float32, on the CPU. They depend on `images` only.

        Raises:
            ValueError: another type or shape.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: got {images.dtype} {list(images.shape)}; give uint8 [N, 3, H, W]")
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:  # with TF32, features on a GPU and on a CPU would differ by 1e-3
            chunks = [self._features(chunk) for chunk in images.split(CHUNK_SIZE[self.device.type])]
        return {name: torch.cat([chunk[name] for chunk in chunks]).numpy() for name in chunks[0]}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        return {name: value.float().cpu() for name, value in self.network(images.to(self.device)).items()}


def build_features(
    kind: str,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    sha256: str | None = None,
    option: str = "--features-weights FILE, or set evaluate.features_weights",
) -> FeatureExtractor:
    """Builds the extractor of a feature network.

    Args:
        kind: The network: the name of its module in this folder.
        weights: A local weights file; None for the network's default. For DINOv2 it decides the size of the network.
        sha256: Expected hash of the file. If the file's name ends in `-` and at least 8 hex digits (the convention
            of torch hub), its hash must start with these digits.
        option: How a user names the weights, for the message if there are none.

    Raises:
        UserError: unknown network, no such file, another hash, weights of another network, failed download.
    """
    cls = find_network(kind)
    try:
        path = Path(weights) if weights else cls.default_weights()
    except UserError as error:
        raise UserError(f"{error}; give a local or s3:// file of its weights: {option}") from None
    digest = _checked_hash(path, sha256)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # an initialisation would be overwritten by the weights
            network = cls.for_weights(state)
        network.load_state_dict(state, assign=True)
    except Exception as error:  # damaged or foreign files raise errors of many types, in `for_weights` too
        raise UserError(f"{path}: not the weights of {kind} ({reason(error)}); name another file") from error
    network.eval().requires_grad_(False)
    network.prepare()
    network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return FeatureExtractor(network, digest, torch.device(device))


def find_network(kind: str) -> type[FeatureNetwork]:
    """The class of a feature network.

    Raises:
        UserError: unknown network.
    """
    try:
        name = known_network(kind)
    except ValueError as error:
        raise UserError(f"features: {error}") from None
    module = importlib.import_module(f"{PACKAGE}.{name}")
    network = getattr(module, "NETWORK", None)
    if not (isinstance(network, type) and issubclass(network, FeatureNetwork)):
        raise TypeError(f"{module.__file__}: defines no NETWORK; assign the subclass of FeatureNetwork to it")
    return network


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
