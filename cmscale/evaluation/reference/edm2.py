"""EDM2's reference files: a `.pkl` of numbers, of which nothing is executed.

{"num_images": int, "source": str, "fid" or "fd_dinov2": {"mu": [D], "sigma": [D, D]}}
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.npz import MAX_ARRAY_BYTES
from cmscale.evaluation.reference.registry import ReferenceFormat, ReferenceWriter
from cmscale.interop.pickled_arrays import array, names_array
from cmscale.io.pickles import Call, Name, plain, read_pickle
from cmscale.io.reading import reading

if TYPE_CHECKING:
    from cmscale.evaluation.features.extractor import FeatureExtractor
    from cmscale.evaluation.reference.reference import Reference

_KEYS = {"inception": "fid", "dinov2_vitl14": "fd_dinov2"}
"""Label of features -> key of their statistics."""


def _read(path: Path, extractor: "FeatureExtractor") -> "Reference":
    """Reads the statistics of the extractor's features, of those that the file holds."""
    from cmscale.evaluation.reference.reference import reference_from_arrays

    key = _KEYS.get(extractor.label)
    if key is None:
        raise UserError(
            f"reference {path}: EDM2's files hold inception and dinov2_vitl14 statistics, "
            f"the evaluation uses {extractor.label}"
        )
    found = _read_document(path)
    statistics = plain(found.get(key))
    if not isinstance(statistics, dict):
        raise UserError(f"reference {path}: not EDM2's statistics (no {key!r})")
    with reading(f"reference {path}", "EDM2's statistics"):
        arrays = {name: array(statistics[name]) for name in ("mu", "sigma") if name in statistics}
        if "num_images" in found:
            arrays["count"] = array(found["num_images"])
    return reference_from_arrays(path, {**arrays, "features": extractor.label}, extractor)


def write_edm2(path: Path, reference: "Reference", images: Iterable[np.ndarray] = ()) -> None:
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
    if not path.exists():
        return {}
    found = _read_document(path)
    if isinstance(found.get("num_images"), Call):
        with reading(path, "EDM2's statistics"):
            found["num_images"] = array(found["num_images"]).tolist()
    same = {"num_images": count, "source": source}
    if found and {key: found.get(key) for key in same} != same:
        raise UserError(f"{path}: exists, with statistics of other images than these {count}; name another file")
    with reading(path, "EDM2's statistics"):
        kept = {key: plain(found[key]) for key in _KEYS.values() if key in found}
        return same | {key: {name: array(numbers[name]) for name in ("mu", "sigma")} for key, numbers in kept.items()}


def _read_document(path: Path) -> dict[str, Any]:
    """The file's dictionary: numbers and text as they are, arrays as calls that are not made."""
    with reading(f"reference {path}", "EDM2's statistics"), path.open("rb") as file:
        size = path.stat().st_size
        if size > MAX_ARRAY_BYTES:
            raise UserError(f"reference {path}: has {size / 2**30:.1f} GiB; is this a reference file?")
        found = plain(read_pickle(file, size=size, allows=_is_allowed))
        if not isinstance(found, dict):
            raise UserError(f"reference {path}: not EDM2's statistics (holds {type(found).__name__}, no dictionary)")
        return found


def _is_allowed(name: Name) -> bool:
    return names_array(name) or str(name) == "dnnlib.util.EasyDict"


class _NumbersPickler(pickle.Pickler):
    """Pickles arrays as calls of `numpy.ndarray`: numpy's own pickles name modules that differ between its versions."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, obj.tobytes())
        return NotImplemented


FORMAT = ReferenceFormat(
    description=".pkl (EDM2)",
    suffixes=(".pkl",),
    matches=lambda _: True,
    read=_read,
    writer=ReferenceWriter(suffix=".pkl", networks=("inception", "dinov2"), check=_check, write=write_edm2),
)
