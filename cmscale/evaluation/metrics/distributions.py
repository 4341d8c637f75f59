"""Owns the metrics that compare distributions of features: Fréchet distance (FID, sFID), KID, Inception
Score."""

from dataclasses import dataclass, field

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.metrics.statistics import Moments

TORCH_FIDELITY_SEED = 2020  # the `rng_seed` with which torch-fidelity draws KID's subsets and shuffles for the IS

_KERNEL_ELEMENTS = 1 << 25  # up to 256 MiB of KID's kernel is computed once for all its subsets


def frechet_distance(a: Moments, b: Moments) -> float:
    """||m_a - m_b||^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, equation 6).

    With C = L L^T the last trace is the nuclear norm of L_a^T L_b. Singular values carry an error of machine
    precision, where the eigenvalues of C_a C_b under a square root would carry its root; degenerate
    covariances (fewer samples than dimensions) need no regularisation. Each Gaussian's factor is computed
    once, a reference's for all sample sets.

    Raises:
        UserError: the widths differ.
    """
    if a.width != b.width:
        raise UserError(f"features of width {a.width} can't be compared with a reference of width {b.width}")
    shift = a.mean - b.mean
    cross = 0.0
    if a.factor.size and b.factor.size:
        cross = float(np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum())
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(distance, 0.0))


def kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = TORCH_FIDELITY_SEED,
) -> tuple[float, float]:
    """KID: unbiased MMD^2 under k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018), mean and deviation over
    subsets.

    Subsets and seed are torch-fidelity's. With fewer than `subset_size` samples on a side, the subsets are
    that small (torch-fidelity refuses).

    Args:
        samples, reference: features [N, D], [M, D].
    """
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise UserError(f"KID: {size} sample(s); it needs at least 2")
    random = np.random.RandomState(seed)
    n, m = len(samples), len(reference)
    whole = None
    if n * n + n * m + m * m <= _KERNEL_ELEMENTS:
        whole = _kernel(samples, samples), _kernel(samples, reference), _kernel(reference, reference)
    values = np.empty(subsets)
    for number in range(subsets):
        i, j = random.choice(n, size, replace=False), random.choice(m, size, replace=False)
        if whole is not None:
            xx, xy, yy = whole[0][np.ix_(i, i)], whole[1][np.ix_(i, j)], whole[2][np.ix_(j, j)]
        else:
            x, y = samples[i], reference[j]
            xx, xy, yy = _kernel(x, x), _kernel(x, y), _kernel(y, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        values[number] = within / (size * (size - 1)) - 2 * xy.sum() / (size * size)
    return float(values.mean()), float(values.std())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x, y) = (x.y / D + 1)^3 of every pair, float64."""
    base = x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1
    return base * base * base  # numpy takes six times as long for `** 3`


@dataclass
class InceptionScoreSums:
    """The Inception Score's sums, block by block: exp of the mean KL(p(y|x) || p(y)), over `splits` parts.

    KL's mean over a part is mean(sum p ln p) - sum q ln q with q the mean of p, so that no probability need
    be kept. Samples are dealt to the parts by a shuffle of their indices, as torch-fidelity does
    (`shuffle_seed`), or in their order, as ADM's evaluator does (None: for 50,000 samples its parts of 5,000
    are ten).
    """

    num_samples: int
    splits: int = 10
    shuffle_seed: int | None = TORCH_FIDELITY_SEED
    _part: np.ndarray = field(init=False, repr=False)
    _counts: np.ndarray = field(init=False, repr=False)
    _entropies: np.ndarray = field(init=False, repr=False)
    _probabilities: np.ndarray | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        n, splits = self.num_samples, self.splits
        order = np.arange(n) if self.shuffle_seed is None else np.random.RandomState(self.shuffle_seed).permutation(n)
        self._part = np.empty(n, dtype=np.int64)
        for part in range(splits):
            self._part[order[part * n // splits : (part + 1) * n // splits]] = part
        self._counts, self._entropies = np.zeros(splits), np.zeros(splits)

    def add(self, indices: range, logits: np.ndarray) -> None:
        """Adds the samples at `indices` by their logits [len(indices), classes]."""
        exact = logits.astype(np.float64)
        exact -= exact.max(axis=1, keepdims=True)
        log_p = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        if self._probabilities is None:
            self._probabilities = np.zeros((self.splits, p.shape[1]))
        parts = self._part[indices.start : indices.stop]
        for part in np.unique(parts):
            mine = parts == part
            self._counts[part] += mine.sum()
            self._entropies[part] += (p[mine] * log_p[mine]).sum()
            self._probabilities[part] += p[mine].sum(axis=0)

    @property
    def has_samples(self) -> bool:
        return self._probabilities is not None

    def score(self) -> tuple[float, float]:
        """Mean and deviation over the parts that hold samples."""
        if self._probabilities is None:
            raise UserError("Inception Score: no samples")
        held = self._counts > 0
        q = self._probabilities[held] / self._counts[held, None]
        q_entropy = np.where(q > 0, q * np.log(np.where(q > 0, q, 1.0)), 0.0).sum(axis=1)
        scores = np.exp(self._entropies[held] / self._counts[held] - q_entropy)
        return float(scores.mean()), float(scores.std())


def inception_score(
    logits: np.ndarray, *, splits: int = 10, shuffle_seed: int | None = TORCH_FIDELITY_SEED
) -> tuple[float, float]:
    """The Inception Score of logits [N, classes]: mean and deviation over the splits (see
    `InceptionScoreSums`)."""
    sums = InceptionScoreSums(len(logits), splits, shuffle_seed)
    sums.add(range(len(logits)), logits)
    return sums.score()
