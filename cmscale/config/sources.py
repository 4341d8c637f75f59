"""Recognises what a SOURCE of weights is: a file by its name, our own exports by their metadata."""

import re
from collections.abc import Mapping
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.place import split_hash

_OPENAI, _NVLABS, _SAFETENSORS, _SAMPLES = (".pt", ".pth"), (".pkl",), (".safetensors",), (".npz",)
_FILES = (*_OPENAI, *_NVLABS, *_SAFETENSORS, *_SAMPLES)

_CARD = ("config", "step", "weights")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_openai(source: str) -> bool:
    """Whether it is a state dict of OpenAI's, `.pt`."""
    return _ends(source, _OPENAI)


def is_nvlabs(source: str) -> bool:
    """Whether it is a pickle of NVlabs' EDM, `.pkl`."""
    return _ends(source, _NVLABS)


def is_safetensors(source: str) -> bool:
    """Whether it is a safetensors file."""
    return _ends(source, _SAFETENSORS)


def is_npz(source: str) -> bool:
    """Whether it is finished samples, `.npz`."""
    return _ends(source, _SAMPLES)


def names_file(source: str) -> bool:
    """Whether it is one file, of any of these kinds."""
    return _ends(source, _FILES)


def _ends(source: str, endings: tuple[str, ...]) -> bool:
    """Compares the end of a name, in either case, without the hash that may follow it."""
    return split_hash(source)[0].rstrip("/").lower().endswith(endings)


def own_card(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """The metadata of a safetensors file that cmscale wrote; None if something else wrote it."""
    if any(name not in metadata for name in _CARD) or not re.fullmatch(r"[0-9]{1,15}", metadata["step"]):
        return None
    return {name: metadata[name] for name in _CARD}


def refuse_hub_name(source: str) -> None:
    """Refuses the name of a model on a hub, `openai/diffusers-cd_bedroom256_l2`: nothing is downloaded unasked.

    Raises:
        UserError: it is such a name, and no path.
    """
    owner, _, name = source.partition("/")
    if _HUB_NAME.fullmatch(source) and not Path(owner).exists() and not _ends(name, _FILES):
        raise UserError(
            f"{source}: no such path; a model of the Hugging Face Hub is downloaded first, for example by "
            f"`hf download {source} --local-dir {name}`: then give {name}"
        )
