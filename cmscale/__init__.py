"""Trains, samples and evaluates consistency models at 256 px, on one machine or a Slurm cluster.

import cmscale

model = cmscale.load("runs/NAME")  # or s3://..., model.safetensors, ...
model.sample(4, steps=2, seed=0)[0].save("sample.png")
model.inpaint("photo.png", mask="mask.png").save("edited.png")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmscale.config import Config
    from cmscale.errors import UserError
    from cmscale.library import Model, load

__version__ = "0.1.0"
__all__ = ["Config", "Model", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports what Python programs use when it is first asked for, as torch takes seconds."""
    match name:
        case "Config":
            from cmscale.config import Config

            return Config
        case "UserError":
            from cmscale.errors import UserError

            return UserError
        case "Model" | "load":
            from cmscale import library

            return getattr(library, name)
        case _:
            raise AttributeError(f"module 'cmscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
