"""Recognises by its name what a SOURCE of weights is, before anything is read."""

import re
from pathlib import Path

from cmscale.errors import UserError

OPENAI_ENDINGS = (".pt", ".pth")
NVLABS_ENDING = ".pkl"
FILE_ENDINGS = (*OPENAI_ENDINGS, NVLABS_ENDING, ".safetensors", ".npz")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def refuse_hub_name(source: str) -> None:
    """Refuses the name of a model on a hub, `openai/diffusers-cd_bedroom256_l2`: nothing is downloaded unasked.

    Raises:
        UserError: it is such a name, and no path.
    """
    owner, _, name = source.partition("/")
    if _HUB_NAME.fullmatch(source) and not Path(owner).exists() and not name.endswith(FILE_ENDINGS):
        raise UserError(
            f"{source}: no such path; a model of the Hugging Face Hub is downloaded first, for example by "
            f"`hf download {source} --local-dir {name}`: then give {name}"
        )
