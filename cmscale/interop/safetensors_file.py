"""Reads and writes cmscale's export format: safetensors with config, step and weights' name as metadata."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmscale.config import Config, Model, parse_config
from cmscale.config.published import dump_published
from cmscale.config.sources import own_card
from cmscale.errors import UserError
from cmscale.interop.files import located, readable, writable
from cmscale.interop.fingerprint import weights_fingerprint
from cmscale.interop.names import Weights, parameter_shapes
from cmscale.interop.strict import strict_weights, without_wrappers
from cmscale.io.reading import reading


def describe(config: Config, *, step: int, weights_name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of exported weights: `config` (YAML), `step`, `weights` (for example `ema_0.999943`), `sha256`.

    The config is what may be published: without absolute paths, and without what belongs to a site. The hash is that of
    the tensors and of the other metadata, and is compared when the file is read.
    """
    card = {"config": dump_published(config), "step": str(step), "weights": weights_name}
    return {"format": "pt", **card, "sha256": _sha256(card, tensors)}


def _sha256(card: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    described = json.dumps([sorted(card.items()), weights_fingerprint(tensors)])
    return hashlib.sha256(described.encode()).hexdigest()


def write_safetensors(
    target: str | Path, weights: Mapping[str, Tensor], *, config: Config, step: int, weights_name: str
) -> None:
    """Writes the weights with OpenAI's names to a path or `s3://`.

    Raises:
        UserError: the weights are not those of `config.model`, the disk is full, or writing is not allowed.
    """
    state = strict_weights(weights, parameter_shapes(config.model), origin="the weights to write")
    size = sum(4 * tensor.numel() for tensor in state.values())
    with writable(*located(target), size=size) as path:
        save_file(state, path, metadata=describe(config, step=step, weights_name=weights_name, tensors=state))


def read_safetensors(source: str | Path, *, model: Model | None = None) -> tuple[Weights, dict[str, str]]:
    """Reads the weights in a file (a path or `s3://`) and its metadata (see `describe`).

    Args:
        model: The network, for files with OpenAI's names that cmscale did not write: they hold no config, and their
            metadata is {}.

    Raises:
        UserError: the file is missing, damaged, has no config while `model` is None, or its weights do not fit.
    """
    storage, key = located(source)
    origin = storage.join(key)
    with readable(storage, key) as path:
        found, metadata = load_with_metadata(path, origin=origin)
    card = own_card(metadata)
    if card is None:
        found = without_wrappers(found)
    else:
        model = parse_config(card["config"], origin=f"config in {origin}", resolved=True).model
    if model is None:
        raise UserError(f"{origin}: holds no config, as cmscale did not write it; give --config CONFIG [key=value ...]")
    return strict_weights(found, parameter_shapes(model), origin=origin), card or {}


def read_metadata(path: Path, *, origin: str) -> dict[str, str]:
    """The metadata of a safetensors file, whose tensors are not read. Raises UserError if it is damaged."""
    with (
        reading(origin, "a safetensors file", advice="copy it again"),
        safe_open(path, framework="pt", device="cpu") as file,
    ):
        return file.metadata() or {}


def load_with_metadata(path: Path, *, origin: str) -> tuple[Weights, dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata.

    Raises:
        UserError: the file is damaged. Of those that cmscale wrote, every changed bit is seen.
    """
    with (
        reading(origin, "a safetensors file", advice="copy it again"),
        safe_open(path, framework="pt", device="cpu") as file,
    ):
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    card = own_card(metadata)
    if card is not None and metadata.get("sha256", "") not in ("", _sha256(card, found)):  # older files have none
        raise UserError(
            f"{origin}: damaged: holds other bytes than were exported; copy it again, or, if they were changed on "
            "purpose, remove sha256 from its metadata"
        )
    return found, metadata
