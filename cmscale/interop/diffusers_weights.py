"""Finds and reads the files that hold the network of a diffusers folder: one, or several and their index."""

from collections.abc import Mapping

from cmscale.errors import UserError
from cmscale.interop.diffusers_config import json_object
from cmscale.interop.files import readable
from cmscale.interop.names import Weights
from cmscale.interop.safetensors_file import load_with_metadata
from cmscale.interop.torch_file import read_state_dict
from cmscale.io.storage import Storage

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
UNET_VARIANTS = (
    UNET_WEIGHTS,
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16.bin",
)
"""The files that may hold the network, the best first: full precision before half."""


def weight_files(storage: Storage) -> list[str]:
    """The keys of the files that hold the network of a folder.

    Of `UNET_VARIANTS` the first that is there; else those that the index of the first of them lists that has one.

    Raises:
        UserError: there are none, or an index is damaged or lists a file that is not there.
    """
    there = {entry.key for entry in storage.list("unet/")}
    for key in UNET_VARIANTS:
        if key in there:
            return [key]
    index = next((index for index in map(_index_of, UNET_VARIANTS) if index in there), None)
    if index is None:
        raise UserError(f"{storage.join(UNET_WEIGHTS)}: no such file, nor one of {', '.join(UNET_VARIANTS[1:])}")
    origin = storage.join(index)
    listed = json_object(storage.read(index), origin=origin).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) and all(map(_is_name, listed.values())) else set()
    if not names:
        raise UserError(f"{origin}: names no files in its weight_map; restore the file that diffusers wrote")
    if absent := sorted(names - {key.removeprefix("unet/") for key in there}):
        raise UserError(f"{storage.join('unet')}: no {absent[0]}, which {index} lists; copy the folder again")
    return [f"unet/{name}" for name in sorted(names)]


def read_weights(
    storage: Storage, keys: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Weights, dict[str, str]]:
    """The tensors in files of a network, and the metadata of one that is in a single safetensors file.

    Args:
        keys: From `weight_files`.
        shapes: The network's; from files that are no safetensors nothing else is read.

    Raises:
        UserError: a file is damaged, or a tensor is in two.
    """
    found: Weights = {}
    metadata: dict[str, str] = {}
    for key in keys:
        origin = storage.join(key)
        with readable(storage, key) as path:
            if key.endswith(".safetensors"):
                more, metadata = load_with_metadata(path, origin=origin)
            else:
                more = read_state_dict(path, {name: (shape,) for name, shape in shapes.items()}, origin=origin)
        if twice := sorted(found.keys() & more.keys()):
            raise UserError(f"{origin}: holds {twice[0]}, as another file does; copy the folder again")
        found |= more
    return found, metadata if len(keys) == 1 else {}


def _index_of(key: str) -> str:
    """The index of the files in which diffusers' `save_pretrained` writes what does not fit into one."""
    plain = key.replace(".fp16.", ".")
    return f"{plain}.index.json" if plain == key else f"{plain}.index.fp16.json"


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith((".safetensors", ".bin")) and "/" not in name
