"""Owns EDM2's reference statistics: pickles of numbers alone, read without executing anything."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.metrics.statistics import Moments

_KEYS = {"inception": "fid", "dinov2_vitl14": "fd_dinov2"}


def read_edm2(path: Path, *, features: str) -> dict[str, Any]:
    """`mu`, `sigma`, and the `count` where the file says it, of the statistics of these features.

    Raises:
        UserError: features that EDM2 knows nothing of, no such statistics, or more than numbers in the file.
    """
    key = _KEYS.get(features)
    if key is None:
        raise UserError(
            f"reference {path}: EDM2 files hold Inception and dinov2_vitl14 statistics, the evaluation uses {features}"
        )
    found = _read_numbers(path)
    if not isinstance(found, dict) or not isinstance(found.get(key), dict):
        raise UserError(f"reference {path}: not EDM2's statistics (no {key!r})")
    counted = {"count": found["num_images"]} if "num_images" in found else {}
    return {**found[key], **counted, "features": features}


def edm2_beside(path: Path, *, features: str, count: int, source: str) -> dict[str, Any]:
    """What an EDM2 file holds already, to keep beside new statistics; nothing where there is none.

    Raises:
        UserError: features that EDM2 knows nothing of; another file in the way.
    """
    if features not in _KEYS:
        raise UserError(f"{path}: EDM2's files hold Inception and dinov2_vitl14 statistics, not {features}")
    found = _read_numbers(path) if path.exists() else {}
    same = {"num_images": count, "source": source}
    if not isinstance(found, dict) or (found and {key: found.get(key) for key in same} != same):
        raise UserError(f"{path}: is there already, of other images than these {count}; name another file")
    return found


def write_edm2(path: Path, statistics: Moments, *, features: str, count: int, source: str) -> None:
    """Writes the statistics alone, as EDM2's `calculate_metrics.py` reads them: a `.pkl` of numbers.

    {"num_images": int, "source": str, "fid" or "fd_dinov2": {"mu", "sigma"}}. A file of the same images that is there
    already keeps its statistics of other features, so that two runs make EDM2's two metrics.

    Raises:
        UserError: see `edm2_beside`.
    """
    found = edm2_beside(path, features=features, count=count, source=source)
    found |= {
        "num_images": count,
        "source": source,
        _KEYS[features]: {"mu": statistics.mean, "sigma": statistics.covariance},
    }
    staged = path.with_name(f".{path.name}")
    try:
        with staged.open("wb") as file:
            _NumbersPickler(file, protocol=4).dump(found)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _read_numbers(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _NumbersOnly(file).load()
    except Exception as error:
        raise UserError(f"reference {path}: more than numbers in it, refused ({error})") from None


class _NumbersPickler(pickle.Pickler):
    """Pickles arrays as calls of `numpy.ndarray`: numpy's own way names modules that differ between its versions."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, obj.tobytes())
        return NotImplemented


class _NumbersOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; any other name in the file is refused, so nothing is
    executed."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(module, name)
