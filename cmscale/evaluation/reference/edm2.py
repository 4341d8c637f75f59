"""EDM2's reference files: a `.pkl` of numbers, read without executing code in it.

{"num_images": int, "source": str, "fid" or "fd_dinov2": {"mu": [D], "sigma": [D, D]}}
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.features.extractor import FeatureExtractor
from cmscale.evaluation.reference.reference import Reference, reference_from_arrays
from cmscale.evaluation.reference.registry import ReferenceFormat, ReferenceWriter

_KEYS = {"inception": "fid", "dinov2_vitl14": "fd_dinov2"}
"""Label of features -> key of their statistics."""


def _read(path: Path, extractor: FeatureExtractor) -> Reference:
    """Reads the statistics of the extractor's features, of those that the file holds."""
    key = _KEYS.get(extractor.label)
    if key is None:
        raise UserError(
            f"reference {path}: EDM2's files hold inception and dinov2_vitl14 statistics, "
            f"the evaluation uses {extractor.label}"
        )
    found = _read_numbers(path)
    if not isinstance(found, dict) or not isinstance(found.get(key), dict):
        raise UserError(f"reference {path}: not EDM2's statistics (no {key!r})")
    counted = {"count": found["num_images"]} if "num_images" in found else {}
    return reference_from_arrays(path, {**found[key], **counted, "features": extractor.label}, extractor)


def write_edm2(path: Path, reference: Reference, images: Iterable[np.ndarray] = ()) -> None:
    """Writes the statistics without images, as EDM2's `calculate_metrics.py` reads them.

    A file of the same images keeps its statistics of other features: two runs write both of EDM2's metrics.

    Raises:
        UserError: features that EDM2 does not use, or the file holds statistics of other images.
    """
    del images
    features, count, source = str(reference.features), reference.count, reference.name
    assert count is not None, "a reference made from images has a count"
    found = _existing(path, features, count, source)
    found |= {
        "num_images": count,
        "source": source,
        _KEYS[features]: {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance},
    }
    staged = path.with_name(f".{path.name}")
    try:
        with staged.open("wb") as file:
            _NumbersPickler(file, protocol=4).dump(found)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _check(path: Path, features: str, count: int, source: str) -> None:
    _existing(path, features, count, source)


def _existing(path: Path, features: str, count: int, source: str) -> dict[str, Any]:
    """The contents of a file to which these statistics can be added; empty if there is no file."""
    if features not in _KEYS:
        raise UserError(
            f"{path}: EDM2's files hold inception and dinov2_vitl14 statistics, not {features}; use --format adm"
        )
    found = _read_numbers(path) if path.exists() else {}
    same = {"num_images": count, "source": source}
    if not isinstance(found, dict) or (found and {key: found.get(key) for key in same} != same):
        raise UserError(f"{path}: exists, with statistics of other images than these {count}; name another file")
    return found


def _read_numbers(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _NumbersUnpickler(file).load()
    except Exception as error:
        raise UserError(f"reference {path}: refused, as it holds more than numbers ({error})") from None


class _NumbersPickler(pickle.Pickler):
    """Pickles arrays as calls of `numpy.ndarray`: numpy's own pickles name modules that differ between its versions."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, obj.tobytes())
        return NotImplemented


class _NumbersUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers. Any other name is refused, so nothing is executed."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(module, name)


FORMAT = ReferenceFormat(
    description=".pkl (EDM2)",
    suffixes=(".pkl",),
    matches=lambda _: True,
    read=_read,
    writer=ReferenceWriter(suffix=".pkl", networks=("inception", "dinov2"), check=_check, write=write_edm2),
)
