"""Sums of features that can be merged, and the mean and covariance that follow from them.

Sums are taken per block of samples, in float64, and merged in the blocks' order, so the same features give the same
bits on any number of ranks. `checked_moments` refuses what a file calls a mean and a covariance and is none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cmscale.errors import UserError


@dataclass(frozen=True)
class Sums:
    """The number of features x, the sum of x [D] and the sum of x x^T [D, D], in float64."""

    count: int
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Sums":
        """The sums of features [N, D]."""
        exact = features.astype(np.float64)
        return cls(len(exact), exact.sum(axis=0), exact.T @ exact)

    def moments(self) -> "Moments":
        """Mean and unbiased covariance.

        Raises:
            UserError: Fewer than two samples, or features that are not finite.
        """
        if self.count < 2:
            raise UserError(f"statistics: {self.count} sample(s); a covariance needs at least 2")
        if not np.isfinite(self.first).all():
            raise UserError("statistics: features that hold NaN or infinity; check the feature network's weights")
        mean = self.first / self.count
        covariance = (self.second - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Moments(mean, covariance)


def total(parts: Iterable[Sums]) -> Sums:
    """The sum of all parts, added in their order.

    Raises:
        UserError: No parts.
    """
    iterator = iter(parts)
    first = next(iterator, None)
    if first is None:
        raise UserError("statistics: 0 samples; a covariance needs at least 2")
    count, summed, outer = first.count, first.first.copy(), first.second.copy()
    for part in iterator:
        count += part.count
        summed += part.first
        outer += part.second
    return Sums(count, summed, outer)


@dataclass(frozen=True)
class Moments:
    """A Gaussian: mean [D] and covariance [D, D], float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.mean)

    @cached_property
    def factor(self) -> np.ndarray:
        """A matrix L [D, rank] with L L^T = covariance; computed once, then cached.

        The Cholesky factor if the covariance is safely positive definite. Otherwise it comes from an eigendecomposition
        without the eigenvalues within rounding of zero: a degenerate covariance gives a narrower factor, and no square
        root of noise is taken, which would turn 1e-16 into 1e-8.
        """
        covariance = (self.covariance + self.covariance.T) / 2
        rounding = self.width * np.finfo(np.float64).eps
        try:
            lower = np.linalg.cholesky(covariance)
            if lower.diagonal().min() ** 2 > np.trace(covariance) * rounding:
                return lower
        except np.linalg.LinAlgError:
            pass  # not positive definite
        values, vectors = np.linalg.eigh(covariance)
        kept = values > max(values[-1], 0.0) * rounding
        return vectors[:, kept] * np.sqrt(values[kept])


def checked_moments(mean: np.ndarray, covariance: np.ndarray, *, origin: str) -> Moments:
    """The Gaussian with this mean [D] and covariance [D, D], as they were stored.

    Programs compute and store covariances in float32 too, so a matrix counts as one if it is symmetric and positive
    semidefinite up to 100 roundings of its type, at least of float32: relative to its largest variance, and the sum of
    its negative eigenvalues relative to that of all.

    Args:
        origin: Where they came from; the first words of a message.

    Raises:
        UserError: they are no numbers, their shapes do not fit, a value is not finite, or `covariance` is not one.
    """
    if bad := next((each.dtype for each in (mean, covariance) if each.dtype.kind not in "fiu"), None):
        raise UserError(f"{origin}: a mean and a covariance must be real numbers, not {bad}")
    kept = covariance.dtype if covariance.dtype.kind == "f" else np.dtype("f8")
    tolerance = 100 * max(float(np.finfo(kind).eps) for kind in (kept, np.float32))
    mean, covariance = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{origin}: a mean {list(mean.shape)} and a covariance {list(covariance.shape)} don't fit")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{origin}: the mean or the covariance holds NaN or infinity")
    skew = float(np.abs(covariance - covariance.T).max())
    if skew > tolerance * float(np.abs(covariance.diagonal()).max()):
        raise UserError(f"{origin}: the covariance is not symmetric (entries differ by {skew:.3g}); make it again")
    negative = _negative_eigenvalues((covariance + covariance.T) / 2)
    if -negative.sum() > tolerance * float(np.abs(covariance.diagonal()).sum()):
        raise UserError(
            f"{origin}: the covariance is not positive semidefinite (smallest eigenvalue {negative.min():.3g}, "
            f"trace {np.trace(covariance):.3g}); make it again"
        )
    return Moments(mean, covariance)


def _negative_eigenvalues(symmetric: np.ndarray) -> np.ndarray:
    """The eigenvalues below zero. A Cholesky factor, where there is one, shows in a tenth of the time that none is."""
    try:
        np.linalg.cholesky(symmetric)
    except np.linalg.LinAlgError:
        values = np.linalg.eigvalsh(symmetric)
        return values[values < 0]
    return np.empty(0)
