"""Owns what samples are compared with: reference statistics, read from the formats that the field uses.

Read: ADM `.npz` (`arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`), EDM `.npz` (`mu`, `sigma`), EDM2 `.pkl` (nothing
in it is executed), torch-fidelity's cached statistics (`.pt`), and plain images (`.npz` with `arr_0` alone,
or a folder). Written: ADM's format, with extra keys that say what it was made of, and the statistics alone as EDM
keeps them (`edm2`: as EDM2 does).
"""

import hashlib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmscale.errors import UserError
from cmscale.evaluation.blocks import BLOCK
from cmscale.evaluation.features.extractor import FeatureExtractor
from cmscale.evaluation.images import batches, npz_header, npz_rows, open_images
from cmscale.evaluation.metrics.neighbours import DENSITY_K, Manifold
from cmscale.evaluation.metrics.statistics import Moments, Sums, total
from cmscale.evaluation.reference.edm2 import read_edm2
from cmscale.io.fetch import file_sha256

SUBSET = 10_000  # images kept for KID, precision and recall, as ADM's references
_SUBSET_SEED = 0


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in one kind of features.

    Attributes:
        name: where it came from.
        sha256: of the file read; of the images for a reference made from images.
        features: the label of its features; None where the file doesn't say.
        count: how many images `pooled` holds; None where the file doesn't say.
        pooled, spatial: their Gaussians; spatial (for sFID) where there is one.
        subset: pooled features of some of the images [M, D], for KID, precision and recall; None where there
        are none.
        preprocess, image_size: how the images were made; None where the file doesn't say.
    """

    name: str
    sha256: str
    features: str | None
    count: int | None
    pooled: Moments
    spatial: Moments | None = None
    subset: np.ndarray | None = field(default=None, repr=False)
    preprocess: str | None = None
    image_size: int | None = None
    device: torch.device | str = "cpu"

    @cached_property
    def manifold(self) -> Manifold | None:
        """The subset with its nearest neighbours, for precision and recall."""
        enough = self.subset is not None and len(self.subset) > DENSITY_K
        return Manifold(self.subset, device=self.device) if enough and self.subset is not None else None

    def describe(self) -> dict[str, Any]:
        """What a result records of it."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "count": self.count,
            "subset": None if self.subset is None else len(self.subset),
            "preprocess": self.preprocess,
            "image_size": self.image_size,
        }

    def mismatches(self, *, preprocess: str | None) -> list[str]:
        """One line for a known difference to how the model's data was made, which moves an FID."""
        if None in (self.preprocess, preprocess) or self.preprocess == preprocess:
            return []
        return [f"reference and training data differ in preprocessing: {self.preprocess} against {preprocess}"]

    def refuse_other_size(self, size: tuple[int, int], *, whose: str) -> None:
        """Raises UserError where the reference is known to be of images of another size."""
        if self.image_size is not None and size != (self.image_size, self.image_size):
            raise UserError(
                f"reference {self.name}: made of images of {self.image_size} px, {whose} has {size[0]} x {size[1]}; "
                "compare images of one size"
            )


def read_reference(path: str | Path, extractor: FeatureExtractor) -> Reference:
    """Reads a reference for an extractor's features.

    Where a file holds images (`arr_0`) and not their features, the features are extracted here.

    Raises:
        UserError: no such file, another format, statistics of other features or another width.
    """
    path = Path(path)
    if path.is_dir():
        images = open_images(path)
        return reference_from_images(images.read(), extractor, name=str(path), count=images.count)
    if not path.is_file():
        raise UserError(f"reference {path}: no such file or folder")
    digest = file_sha256(path)
    match path.suffix:
        case ".npz":
            found = _read_npz(path, digest, extractor)
        case ".pkl":
            found = _from_mapping(path, digest, read_edm2(path, features=extractor.label), extractor)
        case ".pt" | ".pth":
            found = _from_mapping(path, digest, _torch_fidelity(path), extractor)
        case _:
            raise UserError(f"reference {path}: statistics are .npz, .pkl (EDM2) or .pt (torch-fidelity)")
    if found.features not in (None, extractor.label):
        raise UserError(f"reference {path}: holds {found.features} features, the evaluation uses {extractor.label}")
    if found.pooled.width != extractor.width:
        raise UserError(
            f"reference {path}: features of width {found.pooled.width}, {extractor.label} gives {extractor.width}"
        )
    _check_further(path, found, extractor)
    return found


def _check_further(path: Path, found: Reference, extractor: FeatureExtractor) -> None:
    """Spatial statistics and single features of the right widths, while nothing has been sampled yet."""
    if found.spatial is not None and extractor.spatial_width not in (None, found.spatial.width):
        raise UserError(
            f"reference {path}: spatial features of width {found.spatial.width}, {extractor.label} gives "
            f"{extractor.spatial_width}"
        )
    if found.subset is not None:
        if found.subset.ndim != 2 or found.subset.shape[1] != extractor.width:
            raise UserError(
                f"reference {path}: features_0 {list(found.subset.shape)}, {extractor.label} gives width "
                f"{extractor.width}"
            )
        if not np.isfinite(found.subset).all():
            raise UserError(f"reference {path}: features_0 holds NaN or infinity")


def reference_from_images(
    images: Iterable[np.ndarray],
    extractor: FeatureExtractor,
    *,
    name: str,
    count: int,
    preprocess: str | None = None,
    subset: int = SUBSET,
) -> Reference:
    """Makes a reference of images (uint8 [H, W, 3], `count` of them). Memory holds a block and the subset's
    features.

    The subset is drawn without replacement from a fixed seed; `subset_indices` says which.

    Raises:
        UserError: fewer than two images.
    """
    chosen = subset_indices(count, subset)
    pooled: list[Sums] = []
    spatial: list[Sums] = []
    kept: list[np.ndarray] = []
    digest = hashlib.sha256()
    at, image_size = 0, None
    for batch in batches(images, BLOCK):
        digest.update(batch.numpy().tobytes())
        features = extractor(batch)
        pooled = [total([*pooled, Sums.of(features["pooled"])])]
        if "spatial" in features:
            spatial = [total([*spatial, Sums.of(features["spatial"])])]
        low, high = np.searchsorted(chosen, [at, at + len(batch)])
        kept.append(features["pooled"][chosen[low:high] - at])
        at += len(batch)
        image_size = batch.shape[-1]
    return Reference(
        name=name,
        sha256=digest.hexdigest(),
        features=extractor.label,
        count=at,
        pooled=total(pooled).moments(),
        spatial=total(spatial).moments() if spatial else None,
        subset=np.concatenate(kept),
        preprocess=preprocess,
        image_size=image_size,
        device=extractor.device,
    )


def subset_indices(count: int, subset: int = SUBSET) -> np.ndarray:
    """Which of `count` images a reference keeps for KID, precision and recall: ascending, always the same."""
    drawn = np.random.RandomState(_SUBSET_SEED).permutation(count)[:subset]
    return np.sort(drawn)


def write_reference(path: Path, reference: Reference, images: Iterable[np.ndarray], *, num_images: int) -> None:
    """Writes a reference in ADM's format, with `images` (the subset, one at a time) as `arr_0`.

    Extra keys: `features_0` (the subset's pooled features), `features`, `preprocess`, `image_size`, `count`,
    `source`.
    """
    arrays: dict[str, np.ndarray] = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.subset is not None:
        arrays["features_0"] = reference.subset
    for key in ("features", "preprocess", "image_size", "count"):
        if (value := getattr(reference, key)) is not None:
            arrays[key] = np.array(value)
    arrays["source"] = np.array(reference.name)
    staged = path.with_name(f".{path.name}")
    try:
        with zipfile.ZipFile(staged, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                _write_images(file, images, num_images)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_edm(path: Path, reference: Reference) -> None:
    """Writes the statistics alone, as EDM's `fid.py` reads them: `.npz` with `mu` and `sigma`, float64.

    Raises:
        UserError: features other than Inception's.
    """
    if reference.features != "inception":
        raise UserError(f"{path}: EDM's files hold Inception statistics, not {reference.features}")
    staged = path.with_name(f".{path.name}.npz")
    try:
        np.savez(staged, mu=reference.pooled.mean, sigma=reference.pooled.covariance)
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
    assert written == count, f"{written} images came where {count} were announced"


def _read_npz(path: Path, digest: str, extractor: FeatureExtractor) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
            found = {name: archive[name] for name in names - {"arr_0"}}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"reference {path}: not an .npz of plain arrays ({error})") from None
    if "mu" not in names and "arr_0" in names:
        images = open_images(path)
        return reference_from_images(images.read(), extractor, name=str(path), count=images.count)
    label = str(found["features"]) if "features" in found else None
    subset = found.get("features_0")
    shape = npz_header(path, "arr_0")[0] if "arr_0" in names else None
    if shape is not None and len(shape) == 4:
        found.setdefault("image_size", shape[1])
    if subset is None and shape and shape[0] and label in (None, extractor.label):
        subset = np.concatenate([extractor(batch)["pooled"] for batch in batches(npz_rows(path, "arr_0"), BLOCK)])
    return _from_mapping(path, digest, {**found, "subset": subset}, extractor)


def _from_mapping(path: Path, digest: str, found: dict[str, Any], extractor: FeatureExtractor) -> Reference:
    return Reference(
        name=str(path),
        sha256=digest,
        features=str(found["features"]) if "features" in found else None,
        count=int(found["count"]) if "count" in found else None,
        pooled=_moments(path, found, "mu", "sigma"),
        spatial=_moments(path, found, "mu_s", "sigma_s") if "mu_s" in found else None,
        subset=_single(path, found.get("subset")),
        preprocess=str(found["preprocess"]) if "preprocess" in found else None,
        image_size=int(found["image_size"]) if "image_size" in found else None,
        device=extractor.device,
    )


def _single(path: Path, features: np.ndarray | None) -> np.ndarray | None:
    """Single features in the precision that ours have."""
    if features is None or features.dtype.kind in "fiu":
        return None if features is None else np.asarray(features, dtype=np.float32)
    raise UserError(f"reference {path}: features_0 are no numbers ({features.dtype})")


def _moments(path: Path, found: dict[str, Any], mean_key: str, covariance_key: str) -> Moments:
    if mean_key not in found or covariance_key not in found:
        raise UserError(f"reference {path}: holds no {mean_key} and {covariance_key}")
    mean, covariance = (np.asarray(found[key], dtype=np.float64) for key in (mean_key, covariance_key))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"reference {path}: {mean_key} {list(mean.shape)} and {covariance_key} {list(covariance.shape)} don't fit"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"reference {path}: {mean_key} or {covariance_key} holds NaN or infinity")
    return Moments(mean, covariance)


def _torch_fidelity(path: Path) -> dict[str, Any]:
    reconstruct = np.zeros(0).__reduce__()[0]  # numpy's own, wherever this version keeps it
    allowed = [np.ndarray, np.dtype, reconstruct, type(np.dtype("f4")), type(np.dtype("f8"))]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"reference {path}: not torch-fidelity's statistics ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise UserError(f"reference {path}: not torch-fidelity's statistics (no mu and sigma)")
    return found
