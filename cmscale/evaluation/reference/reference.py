"""Defines what samples are compared with: statistics of real images in one kind of features."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmscale.errors import UserError
from cmscale.evaluation.blocks import BLOCK
from cmscale.evaluation.features.extractor import FeatureExtractor
from cmscale.evaluation.manifold import DENSITY_K, Manifold
from cmscale.evaluation.reference.subset import SUBSET, subset_indices
from cmscale.evaluation.sample_files import batches
from cmscale.evaluation.statistics import Moments, Sums, checked_moments, total
from cmscale.generation.pixel_hash import PixelHash
from cmscale.io.fetch import file_sha256
from cmscale.io.reading import reading

_LONGEST_TEXT = 1000  # characters
_MOST_IMAGES = 10**12


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in one kind of features.

    Attributes:
        name: Where it came from.
        sha256: Hash of the file; for a reference made from images, hash of their pixels.
        features: Label of the features; None if the file does not state it.
        count: Number of images in `pooled`; None if the file does not state it.
        pooled: Gaussian of the pooled features.
        spatial: Gaussian of the spatial features (for sFID); None if there is none.
        subset: Pooled features of some of the images, float32 [M, D], for KID, precision and recall, or None.
        preprocess, encoding: How the images were made and stored; None if the file does not state it.
        exif: What was done with EXIF orientations when they were made; None if the file does not state it.
        image_size: Their height and width in pixels; None if the file does not state it.
        notes: What a result should say about the images, one line each.
        device: Where distances between features are computed.
    """

    name: str
    sha256: str
    features: str | None
    count: int | None
    pooled: Moments
    spatial: Moments | None = None
    subset: np.ndarray | None = field(default=None, repr=False)
    preprocess: str | None = None
    encoding: str | None = None
    exif: str | None = None
    image_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    device: torch.device | str = "cpu"

    @cached_property
    def manifold(self) -> Manifold | None:
        """The subset with its nearest neighbours; None if it is too small for them."""
        enough = self.subset is not None and len(self.subset) > DENSITY_K
        return Manifold(self.subset, device=self.device) if enough and self.subset is not None else None

    def describe(self) -> dict[str, Any]:
        """What an evaluation's result records about the reference."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "count": self.count,
            "subset": None if self.subset is None else len(self.subset),
            "preprocess": self.preprocess,
            "encoding": self.encoding,
            "exif": self.exif,
            "image_size": None if self.image_size is None else list(self.image_size),
        }

    def mismatches(
        self,
        *,
        preprocess: str | None,
        encoding: str | None,
        size: tuple[int, int],
        exif: str | None = None,
        of: str = "training data",
    ) -> list[str]:
        """How the images differ from those that `of` names in what changes an FID; one line each.

        What could not be compared, as one side does not state it, is a line too, but for EXIF orientations, which few
        images have. `size` is (height, width).
        """
        found, unknown = [], {}
        for what, mine, theirs in (
            ("preprocessing", self.preprocess, preprocess),
            ("encoding", self.encoding, encoding),
            ("image size", self.image_size, size),
        ):
            if mine is None or theirs is None:
                silent = [name for name, value in (("the reference", mine), (f"the {of}", theirs)) if value is None]
                unknown.setdefault(" and ".join(silent), []).append(what)
            elif mine != theirs:
                found.append(f"reference and {of} differ in {what}: {mine} against {theirs}")
        if None not in (self.exif, exif) and self.exif != exif:
            found.append(
                f"reference and {of} differ in what was done with EXIF orientations: {self.exif} against {exif}"
            )
        for silent, whats in unknown.items():
            found.append(f"{' and '.join(whats)} of reference and {of} could not be compared: not known of {silent}")
        return found

    def refuse_other_size(self, size: tuple[int, int], *, of: str) -> None:
        """Raises UserError if the reference is known to be of images of another size than (height, width)."""
        if self.image_size is not None and size != self.image_size:
            mine, theirs = (f"{height} x {width}" for height, width in (self.image_size, size))
            raise UserError(
                f"reference {self.name}: made of images of {mine} px (height x width), {of} has {theirs}; "
                "compare images of one size"
            )


def reference_from_images(
    images: Iterable[np.ndarray],
    extractor: FeatureExtractor,
    *,
    name: str,
    count: int,
    preprocess: str | None = None,
    encoding: str | None = None,
    exif: str | None = None,
    subset: int = SUBSET,
) -> Reference:
    """Makes a reference from `count` uint8 images [H, W, 3], with a block of them and the subset's features in memory.

    The subset is drawn without replacement from a fixed seed: `subset_indices`.

    Raises:
        UserError: fewer than two images, or images of several sizes.
    """
    chosen = subset_indices(count, subset)
    pooled: list[Sums] = []
    spatial: list[Sums] = []
    kept: list[np.ndarray] = []
    pixels = PixelHash()
    at, image_size = 0, None
    for batch in batches(images, BLOCK):
        pixels.add(batch.numpy())
        features = extractor(batch)
        pooled = [total([*pooled, Sums.of(features["pooled"])])]
        if "spatial" in features:
            spatial = [total([*spatial, Sums.of(features["spatial"])])]
        low, high = np.searchsorted(chosen, [at, at + len(batch)])
        kept.append(features["pooled"][chosen[low:high] - at])
        at += len(batch)
        image_size = batch.shape[-2], batch.shape[-1]
    return Reference(
        name=name,
        sha256=pixels.hexdigest(),
        features=extractor.label,
        count=at,
        pooled=total(pooled).moments(),
        spatial=total(spatial).moments() if spatial else None,
        subset=np.concatenate(kept),
        preprocess=preprocess,
        encoding=encoding,
        exif=exif,
        image_size=image_size,
        device=extractor.device,
    )


def reference_from_arrays(path: Path, arrays: Mapping[str, Any], extractor: FeatureExtractor) -> Reference:
    """Makes a reference from the arrays of a file.

    Args:
        arrays: `mu` [D] and `sigma` [D, D]; and any of `mu_s` and `sigma_s`, `subset` [M, D], `features`, `count`,
            `preprocess`, `encoding`, `exif`, `image_size` (a side, or height and width).

    Raises:
        UserError: no `mu` and `sigma`, a matrix that is no covariance, or arrays that do not fit each other.
    """
    return Reference(
        name=str(path),
        sha256=file_sha256(path),
        features=text_of(path, arrays, "features"),
        count=_count(path, arrays, "count"),
        pooled=_moments(path, arrays, "mu", "sigma"),
        spatial=_moments(path, arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None,
        subset=_subset(path, arrays.get("subset")),
        preprocess=text_of(path, arrays, "preprocess"),
        encoding=text_of(path, arrays, "encoding"),
        exif=text_of(path, arrays, "exif"),
        image_size=_image_size(path, arrays["image_size"]) if "image_size" in arrays else None,
        device=extractor.device,
    )


def _image_size(path: Path, value: Any) -> tuple[int, int]:
    """Height and width; older files state one side of square images."""
    sides = np.asarray(value).flatten()
    if sides.dtype.kind not in "iu" or len(sides) not in (1, 2) or sides.min() < 1:
        raise UserError(f"reference {path}: image_size must be a side, or height and width, in pixels")
    return int(sides[0]), int(sides[-1])


def text_of(path: Path, arrays: Mapping[str, Any], key: str) -> str | None:
    """The text under a key, None if there is none. Raises UserError if it is anything but a short text."""
    if key not in arrays:
        return None
    value = np.asarray(arrays[key])
    if value.ndim or value.dtype.kind != "U" or value.dtype.itemsize > 4 * _LONGEST_TEXT:
        raise UserError(f"reference {path}: {key} must be a short text, it is {value.dtype} {list(value.shape)[:8]}")
    with reading(f"reference {path}: {key}", "a short text"):  # numpy stores code points that are no characters
        return str(value)


def _count(path: Path, arrays: Mapping[str, Any], key: str) -> int | None:
    """The whole number under a key, None if there is none."""
    if key not in arrays:
        return None
    value = np.asarray(arrays[key])
    if value.ndim or value.dtype.kind not in "iu" or not 0 < int(value) < _MOST_IMAGES:
        raise UserError(
            f"reference {path}: {key} must be a whole number above 0, it is {str(value)[:40]} ({value.dtype})"
        )
    return int(value)


def _subset(path: Path, features: np.ndarray | None) -> np.ndarray | None:
    """Features in the precision of an extractor."""
    if features is None:
        return None
    if features.dtype.kind not in "fiu":
        raise UserError(f"reference {path}: features_0 must be numbers, it is {features.dtype}")
    return np.asarray(features, dtype=np.float32)


def _moments(path: Path, arrays: Mapping[str, Any], mean_key: str, covariance_key: str) -> Moments:
    if mean_key not in arrays or covariance_key not in arrays:
        raise UserError(f"reference {path}: holds no {mean_key} and {covariance_key}")
    mean, covariance = np.asarray(arrays[mean_key]), np.asarray(arrays[covariance_key])
    origin = f"reference {path}, {mean_key} and {covariance_key}"
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return checked_moments(mean, covariance, origin=origin)
    except np.linalg.LinAlgError as error:  # finite numbers whose sums are not
        raise UserError(f"{origin}: not the statistics of features ({error})") from None
