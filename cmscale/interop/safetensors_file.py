"""Reads and writes cmscale's export format: safetensors with config, step and weights' name as metadata."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmscale.config import Config, dump_config, parse_config
from cmscale.errors import UserError
from cmscale.interop.files import located, readable, writable
from cmscale.interop.names import Weights, parameter_shapes
from cmscale.interop.strict import strict_weights

CARD_KEYS = ("config", "step", "weights")


def describe(config: Config, *, step: int, weights_name: str) -> dict[str, str]:
    """The metadata of exported weights: `config` (YAML), `step`, `weights` (for example `ema_0.999943`)."""
    return {"format": "pt", "config": dump_config(config), "step": str(step), "weights": weights_name}


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
        save_file(state, path, metadata=describe(config, step=step, weights_name=weights_name))


def read_safetensors(source: str | Path) -> tuple[Weights, dict[str, str]]:
    """Reads the weights in a file (a path or `s3://`) and its metadata (see `describe`).

    Raises:
        UserError: the file is missing, damaged, has no metadata, or its weights do not fit its config.
    """
    storage, key = located(source)
    origin = storage.join(key)
    with readable(storage, key) as path:
        found, metadata = load_with_metadata(path, origin=origin)
    card = own_card(metadata)
    if card is None:
        raise UserError(f"{origin}: holds no config; give a file that `cmscale export` or `cmscale import` wrote")
    model = parse_config(card["config"], origin=f"config in {origin}").model
    return strict_weights(found, parameter_shapes(model), origin=origin), card


def own_card(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """The metadata that `describe` wrote; None if cmscale did not write the file."""
    if any(name not in metadata for name in CARD_KEYS) or not metadata["step"].isdecimal():
        return None
    return {name: metadata[name] for name in CARD_KEYS}


def load_with_metadata(path: Path, *, origin: str) -> tuple[Weights, dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{origin}: damaged, or not a safetensors file ({error}); copy it again") from None
