"""Defines what samples are compared with: statistics of real images in one kind of features."""

import hashlib
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
from cmscale.evaluation.sample_files import batches
from cmscale.evaluation.statistics import Moments, Sums, total
from cmscale.io.fetch import file_sha256

SUBSET = 10_000  # images kept for KID, precision and recall, as in ADM's references
_SUBSET_SEED = 0


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
        preprocess, image_size: How the images were made, and their side in pixels; None if the file does not state it.
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
    image_size: int | None = None
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
            "image_size": self.image_size,
        }

    def mismatches(self, *, preprocess: str | None) -> list[str]:
        """One line per known difference from the preprocessing of the model's data, as it changes an FID."""
        if None in (self.preprocess, preprocess) or self.preprocess == preprocess:
            return []
        return [f"reference and training data differ in preprocessing: {self.preprocess} against {preprocess}"]

    def refuse_other_size(self, size: tuple[int, int], *, of: str) -> None:
        """Raises UserError if the reference is known to be of images of another size than (height, width)."""
        if self.image_size is not None and size != (self.image_size, self.image_size):
            raise UserError(
                f"reference {self.name}: made of images of {self.image_size} px, {of} has {size[0]} x {size[1]}; "
                "compare images of one size"
            )


def reference_from_images(
    images: Iterable[np.ndarray],
    extractor: FeatureExtractor,
    *,
    name: str,
    count: int,
    preprocess: str | None = None,
    subset: int = SUBSET,
) -> Reference:
    """Makes a reference from `count` uint8 images [H, W, 3], with a block of them and the subset's features in memory.

    The subset is drawn without replacement from a fixed seed: `subset_indices`.

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
    """Indices of the images, of `count`, that a reference keeps: ascending, and the same for the same count."""
    drawn = np.random.RandomState(_SUBSET_SEED).permutation(count)[:subset]
    return np.sort(drawn)


def reference_from_arrays(path: Path, arrays: Mapping[str, Any], extractor: FeatureExtractor) -> Reference:
    """Makes a reference from the arrays of a file.

    Args:
        arrays: `mu` [D] and `sigma` [D, D]; and any of `mu_s` and `sigma_s`, `subset` [M, D], `features`, `count`,
            `preprocess`, `image_size`.

    Raises:
        UserError: no `mu` and `sigma`, or arrays that do not fit each other.
    """
    return Reference(
        name=str(path),
        sha256=file_sha256(path),
        features=str(arrays["features"]) if "features" in arrays else None,
        count=int(arrays["count"]) if "count" in arrays else None,
        pooled=_moments(path, arrays, "mu", "sigma"),
        spatial=_moments(path, arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None,
        subset=_subset(path, arrays.get("subset")),
        preprocess=str(arrays["preprocess"]) if "preprocess" in arrays else None,
        image_size=int(arrays["image_size"]) if "image_size" in arrays else None,
        device=extractor.device,
    )


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
    mean, covariance = (np.asarray(arrays[key], dtype=np.float64) for key in (mean_key, covariance_key))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"reference {path}: {mean_key} {list(mean.shape)} and {covariance_key} {list(covariance.shape)} don't fit"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"reference {path}: {mean_key} or {covariance_key} holds NaN or infinity")
    return Moments(mean, covariance)
