"""torch-fidelity's cached statistics: a `.pt` with `mu` and `sigma`, read without executing code in it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.npz import MAX_ARRAY_BYTES
from cmscale.evaluation.reference.registry import ReferenceFormat
from cmscale.interop.pickled_arrays import array, names_array
from cmscale.io.pickles import plain
from cmscale.io.reading import reading

if TYPE_CHECKING:
    from cmscale.evaluation.features.extractor import FeatureExtractor
    from cmscale.evaluation.reference.reference import Reference
    from cmscale.interop.torch_file import TorchFile


def _read(path: Path, extractor: "FeatureExtractor") -> "Reference":
    from cmscale.evaluation.reference.reference import reference_from_arrays

    return reference_from_arrays(path, _load(path), extractor)


def _load(path: Path) -> dict[str, np.ndarray]:
    from cmscale.interop.torch_file import names_tensor, open_torch

    with (
        reading(f"reference {path}", "torch-fidelity's statistics"),
        open_torch(path, allows=lambda name: names_tensor(name) or names_array(name)) as file,
    ):
        found = plain(file.value)
        if not isinstance(found, dict):
            raise UserError(f"reference {path}: not torch-fidelity's statistics (no mu and sigma)")
        return {key: _numbers(path, file, found[key]) for key in ("mu", "sigma") if key in found}


def _numbers(path: Path, file: "TorchFile", value: Any) -> np.ndarray:
    """An array of numpy's or torch's."""
    tensor = file.tensor(value)
    if tensor is None:
        return array(value)
    if tensor.numel * tensor.dtype.itemsize > MAX_ARRAY_BYTES:
        raise UserError(f"reference {path}: an array of {tensor.numel} numbers; is this a reference file?")
    return tensor.load().double().numpy()


FORMAT = ReferenceFormat(
    description=".pt with mu and sigma (torch-fidelity)",
    suffixes=(".pt", ".pth"),
    matches=lambda _: True,
    read=_read,
)
