"""torch-fidelity's cached statistics: a `.pt` with `mu` and `sigma`, read without executing code in it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmscale.errors import UserError
from cmscale.evaluation.features.extractor import FeatureExtractor
from cmscale.evaluation.reference.reference import Reference, reference_from_arrays
from cmscale.evaluation.reference.registry import ReferenceFormat


def _read(path: Path, extractor: FeatureExtractor) -> Reference:
    return reference_from_arrays(path, _load(path), extractor)


def _load(path: Path) -> dict[str, Any]:
    reconstruct = np.zeros(0).__reduce__()[0]  # its module differs between versions of numpy
    allowed = [np.ndarray, np.dtype, reconstruct, type(np.dtype("f4")), type(np.dtype("f8"))]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"reference {path}: not torch-fidelity's statistics ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise UserError(f"reference {path}: not torch-fidelity's statistics (no mu and sigma)")
    return found


FORMAT = ReferenceFormat(
    description=".pt with mu and sigma (torch-fidelity)",
    suffixes=(".pt", ".pth"),
    matches=lambda _: True,
    read=_read,
)
