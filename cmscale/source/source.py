"""A trained network in memory: its config, its weights and where they come from."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cmscale.config import Config
from cmscale.config.added import added_at_older_value
from cmscale.consistency.solver import Denoise
from cmscale.errors import UserError
from cmscale.interop.fingerprint import weights_fingerprint
from cmscale.io.storage import open_storage
from cmscale.model.attention_choice import choose
from cmscale.model.precondition import denoiser_for
from cmscale.model.unet import build_unet
from cmscale.runs.manifests import DatasetManifest, read_dataset_manifest

IMPORTED = "imported"
"""The name of weights that come from another project."""


@dataclass(frozen=True)
class Source:
    """A trained network: its config, its weights (OpenAI's names, float32, on the CPU), and their origin."""

    origin: str
    config: Config
    weights: dict[str, torch.Tensor]
    weights_name: str
    step: int
    run_dir: Path | None = None

    def denoiser(self, device: torch.device) -> Denoise:
        """The network in evaluation mode on a device, with its method's preconditioning."""
        attention = choose(self.config.model, device, torch.float32).kind
        network = build_unet(self.config.model.model_copy(update={"attention": attention}))
        network.to(torch.float32)  # parameters of a program's default dtype would round the weights
        network.load_state_dict(self.weights)
        network.to(device).eval().requires_grad_(False)
        return denoiser_for(self.config.method, network)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: arrays, as of a tensor pickle would store all that it is a part of."""
        return {**self.__dict__, "weights": {name: tensor.numpy() for name, tensor in self.weights.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["weights"] = {name: torch.from_numpy(array) for name, array in state["weights"].items()}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and of the method's settings."""
        method = self.config.method
        settings = method.model_dump_json(exclude=added_at_older_value("method", method.model_dump()))
        return hashlib.sha256(f"{settings} {weights_fingerprint(self.weights)}".encode()).hexdigest()

    @property
    def is_imported(self) -> bool:
        """Whether the weights come from another project, so that the config says nothing about their training."""
        return self.weights_name == IMPORTED

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a sample."""
        return (3, self.config.model.image_size, self.config.model.image_size)


def dataset_of(source: Source) -> DatasetManifest | None:
    """The manifest of the data that a source was trained on; None if it can't be read any more.

    The config of imported weights says how they are used here, not what they were trained on.
    """
    if source.is_imported:
        return None
    try:
        return read_dataset_manifest(open_storage(source.config.data.path))
    except (UserError, ConnectionError):
        return None
