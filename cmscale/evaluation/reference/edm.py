"""EDM's reference files: an `.npz` with `mu` and `sigma`, float64, of the Inception features."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.npz import npz_arrays, npz_names
from cmscale.evaluation.reference.registry import ReferenceFormat, ReferenceWriter

if TYPE_CHECKING:
    from cmscale.evaluation.features.extractor import FeatureExtractor
    from cmscale.evaluation.reference.reference import Reference

_ARRAYS = frozenset({"mu", "sigma"})


def _read(path: Path, extractor: "FeatureExtractor") -> "Reference":
    from cmscale.evaluation.reference.reference import reference_from_arrays

    return reference_from_arrays(path, npz_arrays(path, _ARRAYS), extractor)


def write_edm(path: Path, reference: "Reference", images: Iterable[np.ndarray] = ()) -> None:
    """Writes the statistics without images, as EDM's `fid.py` reads them.

    Raises:
        UserError: features other than Inception's.
    """
    del images
    _check(path, str(reference.features))
    staged = path.with_name(f".{path.name}.npz")
    try:
        np.savez(staged, mu=reference.pooled.mean, sigma=reference.pooled.covariance)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _check(path: Path, features: str, count: int = 0, source: str = "") -> None:
    del count, source
    if features != "inception":
        raise UserError(f"{path}: EDM's files hold Inception statistics, not {features}; use --format adm")


FORMAT = ReferenceFormat(
    description=".npz with mu and sigma (EDM)",
    suffixes=(".npz",),
    matches=lambda path: npz_names(path) == _ARRAYS,
    read=_read,
    writer=ReferenceWriter(suffix=".npz", networks=("inception",), check=_check, write=write_edm),
)
