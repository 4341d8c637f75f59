"""References that are images: a folder, or an `.npz` with `arr_0` and without statistics."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cmscale.evaluation.npz import npz_names
from cmscale.evaluation.reference.registry import ReferenceFormat

if TYPE_CHECKING:
    from cmscale.evaluation.features.extractor import FeatureExtractor
    from cmscale.evaluation.reference.reference import Reference


def _matches(path: Path) -> bool:
    return path.is_dir() or ("arr_0" in (names := npz_names(path)) and "mu" not in names)


def _read(path: Path, extractor: "FeatureExtractor") -> "Reference":
    from cmscale.evaluation.reference.reference import reference_from_images
    from cmscale.evaluation.sample_files import open_images

    images = open_images(path)
    reference = reference_from_images(
        images.read(), extractor, name=str(path), count=images.count, encoding=images.encoding
    )
    return replace(reference, notes=tuple(images.notes()))


FORMAT = ReferenceFormat(
    description="a folder of images, or .npz with arr_0",
    suffixes=("", ".npz"),
    matches=_matches,
    read=_read,
)
