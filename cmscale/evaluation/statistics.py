"""Sums of features that can be merged, and the mean and covariance that follow from them.

Sums are taken per block of samples, in float64, and merged in the blocks' order, so the same features give the same
bits on any number of ranks.
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

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.count + other.count, self.first + other.first, self.second + other.second)

    def moments(self) -> "Moments":
        """Mean and unbiased covariance.

        Raises:
            UserError: Fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"statistics: {self.count} sample(s); a covariance needs at least 2")
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
