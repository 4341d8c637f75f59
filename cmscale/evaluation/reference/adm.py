"""ADM's reference files: an `.npz` with images (`arr_0`) and statistics (`mu`, `sigma`, `mu_s`, `sigma_s`).

This package writes more arrays, which ADM's evaluator ignores: `features_0` (pooled features of the images),
`features`, `preprocess`, `encoding`, `exif`, `image_size` (height and width), `count`, `source`.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.npz import npz_arrays, npz_names
from cmscale.evaluation.reference.registry import ReferenceFormat, ReferenceWriter

if TYPE_CHECKING:
    from cmscale.evaluation.features.extractor import FeatureExtractor
    from cmscale.evaluation.reference.reference import Reference

_READ = frozenset(
    {"mu", "sigma", "mu_s", "sigma_s", "features_0", "features", "preprocess", "encoding", "exif"}
    | {"image_size", "count"}
)
"""What is read of a file besides its images; other arrays are left alone."""


def _matches(path: Path) -> bool:
    names = npz_names(path)
    return "mu" in names and names != {"mu", "sigma"}


def _read(path: Path, extractor: "FeatureExtractor") -> "Reference":
    """Without `features_0`, the features of the images in `arr_0` are extracted."""
    from cmscale.evaluation.blocks import BLOCK
    from cmscale.evaluation.reference.reference import reference_from_arrays, text_of
    from cmscale.evaluation.sample_files import batches, open_images

    names = npz_names(path)
    arrays: dict[str, Any] = dict(npz_arrays(path, names & _READ))
    images = open_images(path) if "arr_0" in names else None
    label = text_of(path, arrays, "features")
    subset = arrays.pop("features_0", None)
    if images is not None:
        arrays.setdefault("image_size", np.array((images.height, images.width)))
    if subset is None and images is not None and images.count and label in (None, extractor.label):
        subset = np.concatenate([extractor(batch)["pooled"] for batch in batches(images.read(), BLOCK)])
    found = reference_from_arrays(path, arrays if subset is None else {**arrays, "subset": subset}, extractor)
    if images is not None and found.image_size != (images.height, images.width):
        shape = f"{images.height} x {images.width} px"
        raise UserError(f"reference {path}: arr_0 holds images of {shape}, unlike its image_size")
    return found


def write_adm(path: Path, reference: "Reference", images: Iterable[np.ndarray]) -> None:
    """Writes a reference with the images of its subset, uint8 [H, W, 3], in the subset's order."""
    arrays: dict[str, np.ndarray] = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    num_images = 0 if reference.subset is None else len(reference.subset)
    if reference.subset is not None and num_images:
        arrays["features_0"] = reference.subset
    for key in ("features", "preprocess", "encoding", "exif", "image_size", "count"):
        if (value := getattr(reference, key)) is not None:
            arrays[key] = np.array(value)
    arrays["source"] = np.array(reference.name)
    staged = path.with_name(f".{path.name}")
    try:
        with zipfile.ZipFile(staged, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
            if num_images:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    _write_images(file, images, num_images)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _write_images(file: Any, images: Iterable[np.ndarray], count: int) -> None:
    written = 0
    for image in images:
        if written == 0:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *image.shape)}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(image).tobytes())
        written += 1
    assert written == count, f"{written} images for a subset of {count}"


FORMAT = ReferenceFormat(
    description=".npz with mu and sigma, and images (ADM) or more arrays",
    suffixes=(".npz",),
    matches=_matches,
    read=_read,
    writer=ReferenceWriter(suffix=".npz", keeps_images=True, write=write_adm),
)
